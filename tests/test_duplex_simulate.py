"""Simulated streams: what was drawn is in them, in sound and in events, and nothing gives the answer away."""

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from typer.testing import CliRunner

from covo_rl.data import DataError
from covo_rl.duplex import timeline
from covo_rl.duplex.data import parse_stream, stream_content
from covo_rl.duplex.digits import digit_dialogues
from covo_rl.duplex.grid import chunk_of, decision_time
from covo_rl.duplex.presets import PRESETS, draw_pause, shift_chunk
from covo_rl.duplex.simulate import Simulator
from covo_rl.duplex.simulated_set import stream_statistics, write_simulated_set
from covo_rl.duplex.sound import UserChannel, measure_levels, room_tone, speech_islands
from covo_rl.duplex.sources import Recording, SourceDialogue, SourceTurn, SplitError, Surroundings, split_dialogues
from covo_rl.duplex.stream_files import read_stream, read_streams
from covo_rl.duplex.targets import stream_questions, stream_replies
from covo_rl.run.commands.data import app
from covo_rl.run.duplex_sources import read_back_channels
from covo_rl.synth.back_channels import BACK_CHANNELS, listener, say_back_channel
from covo_rl.synth.speech import write_wav

RATE = 24_000


@pytest.fixture(scope="module")
def dialogues():
    return digit_dialogues("train", 6)


@pytest.fixture(scope="module")
def taught(dialogues):
    return [*Simulator(dialogues, PRESETS["sft"], 0).streams()]


@pytest.fixture(scope="module")
def tests(dialogues):
    """(dialogue, kind) -> stream and wave, of two dialogues."""
    simulator = Simulator(dialogues[:2], PRESETS["test"], 0, Surroundings(()))
    kinds = PRESETS["test"].kinds
    return {(i, kind): simulator.stream(dialogues[i], kind) for i in range(2) for kind in kinds}


def tone(seconds, level=0.3, hz=440):
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)


def longest_run(wave_T):
    """Samples in the longest run of equal values, as 16 bits."""
    values_T = np.round(wave_T * 32_767).astype(np.int16)
    changes = np.flatnonzero(values_T[1:] != values_T[:-1])
    return int(np.diff(np.concatenate([[-1], changes, [len(wave_T) - 1]])).max())


def rms_db(wave_T):
    return 20 * np.log10(np.sqrt(np.mean(np.square(wave_T))))


# -- whole dialogues -----------------------------------------------------------------------------------------------


def test_no_channel_has_digital_silence(taught, tests):
    for stream, wave_T2 in [*taught, *tests.values()]:
        for channel in wave_T2.T:
            assert longest_run(channel) <= 0.01 * RATE, stream.id
    assert longest_run(np.concatenate([np.random.default_rng(0).normal(0, 0.1, 500), np.zeros(300)])) == 300


def test_streams_are_valid_and_whole_chunks_long(taught, tests):
    for stream, wave_T2 in [*taught, *tests.values()]:
        assert parse_stream(stream_content(stream)) == stream
        assert len(wave_T2) == round(stream.seconds * RATE)
        assert len(wave_T2) % 3840 == 0
        assert np.abs(wave_T2).max() <= 0.99 + 1e-6


def test_the_model_answers_as_people_do_and_stops_three_chunks_after_a_barge_in(taught):
    answered = barged = 0
    for stream, _ in taught:
        broken_at = -1
        for turn, reply in zip(stream.turns_of("model"), stream_replies(stream), strict=True):
            end = max(user.end for user in stream.turns_of("user") if user.end < turn.start)
            delay = decision_time(reply.shift) - end
            assert delay >= 0.3 - 1e-4
            assert delay <= 1.0 + 1e-4 or reply.shift == broken_at + 1
            answered += 1
            broken_at = reply.end
            for mark in stream.marks("barge_in"):
                if turn.start < mark.start < turn.end:
                    assert reply.break_at == chunk_of(mark.start) + 3
                    assert turn.start + 0.3 - 1e-4 <= mark.start
                    barged += 1
    assert answered >= 12
    assert barged >= 2


def test_an_interrupted_reply_is_silent_after_its_break(taught):
    seen = 0
    for stream, wave_T2 in taught:
        for turn in stream.turns_of("model"):
            if turn.interrupted_at is not None:
                at = round(turn.end * RATE)
                assert rms_db(wave_T2[at - 4800 : at, 1]) > -40
                assert rms_db(wave_T2[at + 24 : at + 4800, 1]) < -65
                seen += 1
    assert seen >= 2


def test_back_channels_leave_the_turn_and_are_heard(tests):
    for dialogue in range(2):
        stream, wave_T2 = tests[dialogue, "back_channel"]
        (mark,) = stream.marks("back_channel")
        (reply,) = [turn for turn in stream.turns_of("model") if turn.start < mark.start < turn.end]
        assert reply.start + 0.3 - 1e-4 <= mark.start
        assert mark.end <= reply.end - 1.0 + 1e-4
        assert 0.2 <= mark.end - mark.start <= 0.6
        assert mark.text in BACK_CHANNELS["en"]
        user = [turn for turn in stream.turns_of("user") if turn.end < reply.start][-1]
        spoken = rms_db(wave_T2[round(user.start * RATE) : round(user.end * RATE), 0])
        heard = rms_db(wave_T2[round(mark.start * RATE) : round(mark.end * RATE), 0])
        assert -8 < heard - spoken < 3


# -- decisions that rl and test streams ask for -----------------------------------------------------------------------


def test_each_kind_of_test_stream_asks_its_question_last(tests):
    for (_, kind), (stream, _) in tests.items():
        question = stream_questions(stream)[-1]
        assert question.kind == kind, stream.id
        assert all(turn.interrupted_at is None for turn in stream.turns_of("model"))
        if kind == "pause":
            assert all(1.0 - 1e-3 <= end - start <= 4.0 + 1e-3 for start, end in question.pauses)
        if kind in ("pause", "single"):
            assert stream.seconds - question.turn_end >= 4.0 - 1e-4  # a late answer is no missing one
        if kind in ("barge_in", "back_channel", "hold"):
            last = question.first_chunk + question.decisions
            assert last <= round(stream.seconds / 0.16)


def test_a_pause_sounds_like_the_time_after_the_turn(tests):
    """Otherwise level would tell one from the other."""
    for dialogue in range(2):
        stream, wave_T2 = tests[dialogue, "pause"]
        turn = stream.turns_of("user")[-1]
        start, end = max(turn.pauses, key=lambda pause: pause[1] - pause[0])
        within = wave_T2[round((start + 0.15) * RATE) : round((end - 0.15) * RATE), 0]
        after = wave_T2[round((turn.end + 0.2) * RATE) : round((turn.end + 3) * RATE), 0]
        assert abs(rms_db(within) - rms_db(after)) < 1


def test_rl_kinds_are_drawn_by_their_shares():
    class Drawn(Simulator):
        def stream(self, dialogue, kind):
            return kind

    base = digit_dialogues("test", 1, exchanges=1)[0]
    kinds = Counter(Drawn([replace(base, id=str(i)) for i in range(1500)], PRESETS["rl"], 0).streams())
    assert {kind: round(count / 100) for kind, count in kinds.items()} == {
        "single": 4, "pause": 6, "back_channel": 2, "barge_in": 2, "hold": 1,
    }  # fmt: skip


# -- draws ---------------------------------------------------------------------------------------------------------


def test_pauses_and_gaps_have_the_lengths_of_their_table():
    rng = np.random.default_rng(0)
    taught = [draw_pause(rng, PRESETS["sft"]) for _ in range(2000)]
    assert 0.18 <= min(taught) < 0.2
    assert 0.65 < max(taught) <= 0.7
    assert np.median(taught) == pytest.approx(0.35, abs=0.02)
    trained = [draw_pause(rng, PRESETS["rl"]) for _ in range(2000)]
    assert 0.3 <= min(trained) < 0.31
    assert 2.9 < max(trained) <= 3.0
    assert np.median(trained) == pytest.approx(np.sqrt(0.3 * 3), abs=0.06)  # log-uniform: the geometric middle
    delays = [decision_time(shift_chunk(end, rng)) - end for end in rng.uniform(0, 9, 2000)]
    assert 0.3 - 1e-6 <= min(delays) < 0.32
    assert 0.98 < max(delays) <= 1.0 + 1e-6
    assert np.median(delays) == pytest.approx(0.5, abs=0.05)


def test_a_stream_depends_on_its_own_row_only(dialogues):
    """Of nobody whose speakers are unknown anything is taken."""
    unknown = [replace(d, turns=tuple(replace(turn, speaker=None) for turn in d.turns)) for d in dialogues[:3]]
    (alone, wave_T2), *_ = Simulator(unknown[:1], PRESETS["sft"], 5).streams()
    among, other_T2 = [*Simulator(unknown[1:] + unknown[:1], PRESETS["sft"], 5).streams()][-1]
    assert alone == among
    assert (wave_T2 == other_T2).all()
    assert next(Simulator(unknown, PRESETS["sft"], 6).streams())[0].turns != alone.turns


# -- places of pauses, tone of the room --------------------------------------------------------------------------------


def bursts(*parts):
    """Tones and the silences between them, by seconds, in faint noise."""
    wave_T = np.concatenate([tone(part) * (i % 2 == 0) for i, part in enumerate(parts)])
    return wave_T + np.random.default_rng(1).normal(0, 1e-3, len(wave_T))


def test_without_words_a_pause_may_be_put_into_60_ms_of_quiet_and_nowhere_else():
    wave_T = bursts(0.4, 0.03, 0.4, 0.1, 0.5, 0.2, 0.3)
    islands = speech_islands(wave_T, None, measure_levels(wave_T))
    np.testing.assert_allclose(islands, [(0, 0.83), (0.93, 1.43), (1.63, 1.93)], atol=0.02)


def test_a_sound_that_never_is_quiet_is_one_island():
    noise_T = np.random.default_rng(0).normal(0, 0.1, RATE)
    assert speech_islands(noise_T, None, measure_levels(noise_T)) == [(0.0, 1.0)]


def test_a_pause_lies_between_two_words_and_replaces_the_silence_there():
    wave_T = bursts(0.4, 0.06, 0.4, 0.3, 0.5)
    words = (("one", 0.0, 0.4), ("two", 0.46, 0.86), ("three", 1.16, 1.66))
    laid = Recording(SourceTurn("user", lambda: wave_T, "one two three", words)).lay({0: 1.0})
    np.testing.assert_allclose(laid.fragments, [(0, 0.4), (1.4, 1.8), (2.1, 2.6)], atol=1e-4)
    # cut in the middle of the gap, at 0.43 s; the silence of 0.3 s is a pause that was there before
    assert [(round(start, 4), len(piece)) for start, piece in laid.pieces] == [
        (0.0, round(0.43 * RATE)), (1.37, len(wave_T) - round(0.43 * RATE)),
    ]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in laid.pieces]), wave_T)  # nothing is lost


def test_the_tone_of_a_room_has_its_level_and_colour():
    rng = np.random.default_rng(2)
    noise_T = np.convolve(rng.normal(0, 0.004, 3 * RATE), np.ones(8) / 8, "same")  # dark: most is below 3 kHz
    wave_T = noise_T + np.concatenate([np.zeros(RATE), tone(1), np.zeros(RATE)])
    channel = UserChannel(2 * RATE, [(0, room_tone(wave_T, measure_levels(wave_T)))], rng)
    assert rms_db(channel.wave_T) == pytest.approx(rms_db(noise_T), abs=1.5)
    power = np.square(np.abs(np.fft.rfft(channel.wave_T)))
    assert power[: len(power) // 4].sum() > 0.9 * power.sum()
    channel.put(RATE, tone(0.5))
    np.testing.assert_allclose(channel.wave_T[RATE + 240 : RATE + 11_000], tone(0.5)[240:11_000])


def test_back_channels_last_0_2_to_0_6_s_in_every_language():
    rng = np.random.default_rng(0)
    for language in ("en", "zh", "xx", None):
        for _ in range(5):
            text, wave_T = say_back_channel(language, listener(120, rng), rng)
            assert text in BACK_CHANNELS.get(language or "", BACK_CHANNELS[""])
            assert 0.2 <= len(wave_T) / RATE <= 0.6
            assert np.sqrt(np.mean(wave_T**2)) == pytest.approx(0.1, rel=1e-4)


def test_recorded_back_channels_are_taken_as_they_are(tmp_path, dialogues):
    for name, seconds in (("mm", 0.4), ("long", 1.2)):
        write_wav(tmp_path / f"{name}.wav", bursts(0.0, 0.2, seconds, 0.2))
    rows = [{"id": name, "audio": f"{name}.wav", "text": name} for name in ("mm", "long")]
    with pytest.raises(DataError, match=r"long: 1.2\d s of speech: a back-channel has 0.2 to 0.6 s"):
        read_back_channels(save(tmp_path / "rows.jsonl", rows))
    recorded = read_back_channels(save(tmp_path / "rows.jsonl", rows[:1]))
    simulator = Simulator(dialogues[:1], PRESETS["test"], 0, Surroundings((), recorded))
    stream, wave_T2 = simulator.stream(dialogues[0], "back_channel")
    (mark,) = stream.marks("back_channel")
    assert (mark.text, mark.end - mark.start) == ("mm", pytest.approx(0.4, abs=0.03))
    heard = np.abs(np.fft.rfft(wave_T2[round(mark.start * RATE) : round(mark.end * RATE), 0]))
    assert heard.argmax() * RATE / (2 * (len(heard) - 1)) == pytest.approx(440, abs=5)


def test_the_microphone_hears_the_model_only_if_asked(dialogues):
    def heard(echo):
        simulator = Simulator(dialogues[:1], PRESETS["test"], 0, Surroundings((), echo=echo))
        _, wave_T2 = simulator.stream(dialogues[0], "hold")
        return np.corrcoef(wave_T2[2400:, 0], wave_T2[:-2400, 1])[0, 1]

    assert abs(heard(False)) < 0.005
    assert heard(True) > 0.02


def test_recordings_that_are_digitally_silent_between_words_make_no_silent_stream():
    """Also very quiet ones: the noise is never less than two steps of 16 bits."""
    silent = np.zeros(RATE // 2)
    wave_T = np.concatenate([silent, tone(0.4, 1e-3), silent[:4800], tone(0.5, 1e-3), silent])
    asked = SourceTurn("user", lambda: wave_T, "one two")
    said = SourceTurn("model", lambda: np.concatenate([tone(1), np.zeros(2 * RATE)]), "one two")
    row = SourceDialogue("quiet", (asked, said))
    for kind in ("pause", "back_channel", "hold"):
        stream, wave_T2 = Simulator([row], PRESETS["test"], 0).stream(row, kind)
        assert max(longest_run(channel) for channel in wave_T2.T) <= 0.01 * RATE
        turn = stream.turns_of("user")[0]
        assert turn.fragments[-1][1] - turn.fragments[-1][0] == pytest.approx(0.5, abs=0.03)


def test_noise_lies_below_speech_by_the_ratio_that_is_noted(taught):
    seen = 0
    for stream, wave_T2 in taught:
        (mark,) = stream.marks("noise")
        ratio = float(mark.text.removeprefix("SNR ").removesuffix(" dB"))
        turn = stream.turns_of("user")[0]
        speech = rms_db(wave_T2[round(turn.start * RATE) : round(turn.end * RATE), 0])
        assert 10 <= ratio <= 40
        if ratio < 25:  # below that the room of the recording is louder
            assert speech - rms_db(wave_T2[: round(0.2 * RATE), 0]) == pytest.approx(ratio, abs=3)
            seen += 1
    assert seen >= 1


def test_side_talk_is_somebody_elses_and_weaker(dialogues, monkeypatch):
    monkeypatch.setattr(timeline, "SIDE_TALK_SHARE", 1.0)
    stream, _ = next(Simulator(dialogues, PRESETS["sft"], 1).streams())
    (mark,) = stream.marks("side_talk")
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    other = by_id[stream.source[-1]]
    assert not other.speakers & by_id[stream.source[0]].speakers
    assert mark.text in [turn.text for turn in other.turns if turn.channel == "user"]
    alone = Simulator(dialogues[:1], PRESETS["sft"], 1)
    assert not next(alone.streams())[0].marks("side_talk")
    assert alone.missed["side_talk"] == 1


# -- splits and folders ------------------------------------------------------------------------------------------------


def test_no_speaker_and_no_dialogue_is_in_two_parts(dialogues):
    for seed in range(5):
        parts = split_dialogues(dialogues, 0.3, seed)
        voices = {part: {name for d in members for name in d.speakers} for part, members in parts.items()}
        assert not voices["train"] & voices["test"]
        assert sorted(d.id for members in parts.values() for d in members) == sorted(d.id for d in dialogues)
        assert 1 <= len(parts["test"]) <= 4


def test_dialogues_that_share_a_speaker_through_others_stay_together(dialogues):
    def of(number, *speakers):
        turns = dialogues[0].turns
        return replace(
            dialogues[0],
            id=f"d{number}",
            turns=tuple(
                replace(turn, speaker=name)
                for turn, name in zip(turns, (speakers[0], "m", speakers[-1], "m"), strict=True)
            ),
        )

    rows = [of(0, "a", "b"), of(1, "c", "d"), of(2, "b", "c"), of(3, "e")]
    parts = split_dialogues(rows, 0.3, 0)
    assert sorted(sorted(d.id for d in members) for members in parts.values()) == [["d0", "d1", "d2"], ["d3"]]
    with pytest.raises(SplitError, match="3 dialogues of one user cannot be split by speaker: give a test share of 0"):
        split_dialogues(rows[:3], 0.3, 0)
    with pytest.raises(DataError, match="d0: another dialogue has this id"):
        split_dialogues([rows[0], rows[0]], 0.3, 0)
    with pytest.raises(DataError, match=r"the codes are of 2 tokenizers \(t1, t2\)"):
        split_dialogues([replace(rows[0], tokenizer="t2"), replace(rows[3], tokenizer="t1")], 0.3, 0)


def test_a_single_exchange_is_barged_into_by_what_the_same_user_says_next():
    base = digit_dialogues("test", 6, exchanges=1)
    same = [replace(d, turns=(replace(d.turns[0], speaker="anna"), d.turns[1])) for d in base]
    simulator = Simulator(same, PRESETS["test"], 0)
    stream, _ = next(made for d in same if (made := simulator.stream(d, "barge_in")) is not None)
    assert len(stream.source) >= 2
    assert stream_questions(stream)[-1].kind == "barge_in"
    assert Simulator(same[:1], PRESETS["test"], 0).stream(same[0], "barge_in") is None  # nobody goes on


def test_what_a_dialogue_has_no_place_for_is_counted_once(dialogues):
    first = dialogues[0]
    turns = tuple(replace(turn, words=None, load=lambda: tone(1.0)) for turn in first.turns)
    simulator = Simulator([first], PRESETS["test"], 0, Surroundings(()))
    assert simulator.stream(replace(first, turns=turns), "pause") is None
    assert simulator.missed == {"pause": 1}


def rows_of(folder, dialogues):
    """The dialogues as recordings and rows."""
    rows = []
    for number, dialogue in enumerate(dialogues):
        turns = []
        for place, turn in enumerate(dialogue.turns):
            name = f"{number}-{place}.wav"
            write_wav(folder / name, turn.load())
            role = "user" if turn.channel == "user" else "assistant"
            turns.append({"role": role, "audio": name, "text": turn.text, "words": turn.words, "speaker": turn.speaker})
        rows.append({"id": dialogue.id, "language": "en", "turns": turns})
    return rows


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def simulate(*words):
    return CliRunner().invoke(app, ["simulate-duplex", *map(str, words)], terminal_width=200)


def test_the_command_writes_a_set_and_its_statistics(tmp_path):
    path = save(tmp_path / "rows.jsonl", rows_of(tmp_path, digit_dialogues("validation", 2, exchanges=1)))
    out = tmp_path / "out"
    result = simulate("--dialogues", path, "--output", out, "--seed", 4, "--test-share", 0.3)
    assert result.exit_code == 0, result.output
    statistics = json.loads((out / "statistics.json").read_text())
    assert not set(statistics["speakers"]["train"]) & set(statistics["speakers"]["test"])
    for name in ("sft", "rl", "test"):
        streams = read_streams(out / name)
        assert statistics[name]["streams"] == len(streams)
        part = statistics["dialogues"]["test" if name == "test" else "train"]
        assert {id for stream in streams.values() for id in stream.source} <= set(part)
        stream, wave_T2 = read_stream(next(iter(streams)))
        assert (stream.seed, stream.language, wave_T2.shape[1]) == (4, "en", 2)
    again = simulate("--dialogues", path, "--output", out)
    assert again.exit_code == 2
    assert "is there already" in again.output
    assert simulate("--dialogues", path, "--output", tmp_path / "b", "--preset", "rl2").exit_code == 2
    assert not (tmp_path / "b").exists()


def test_all_that_is_wrong_with_rows_is_said_before_anything_is_written(tmp_path):
    rows = rows_of(tmp_path, digit_dialogues("validation", 2, exchanges=1))
    rows[0]["turns"][1].pop("audio")
    (tmp_path / "1-0.wav").write_bytes(b"RIFF")
    result = simulate("--dialogues", save(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "#2: the assistant's turn has no audio" in result.output
    assert "1-0.wav" in result.output
    assert not (tmp_path / "out").exists()


def test_statistics_count_what_streams_hold(taught):
    streams = [stream for stream, _ in taught]
    found = stream_statistics(streams)
    assert found["streams"] == len(streams)
    assert found["hours"] == pytest.approx(sum(wave_T2.shape[0] for _, wave_T2 in taught) / RATE / 3600)
    assert found["events"] == {
        kind: len([*group])
        for kind, group in groupby(
            sorted((mark for stream in streams for mark in stream.events), key=lambda m: m.type), key=lambda m: m.type
        )
    }
    assert found["interrupted"] == found["events"]["barge_in"]
    assert 0.18 <= found["pause_seconds"]["p10"] <= found["pause_seconds"]["p90"] <= 0.7
    assert 0 < found["overlap_share"] < 0.5
    assert stream_statistics([])["pause_seconds"] is None


def test_presets_that_do_not_exist_are_named(tmp_path, dialogues):
    with pytest.raises(ValueError, match="no preset is called 'dev'; there are sft, rl, test"):
        write_simulated_set(tmp_path / "x", dialogues, 0, presets=["dev"])
