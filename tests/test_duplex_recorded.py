"""Timing on streams that lie in folders: questions and lessons worked out by hand, two steps of RL, what is refused."""

import json
import shutil
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
import yaml

from covo_rl.config import ConfigError
from covo_rl.data.files import read_record
from covo_rl.duplex.config import duplex_options
from covo_rl.duplex.data import DuplexMark, DuplexStream, DuplexTurn
from covo_rl.duplex.digits import digit_dialogues
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.presets import PRESETS
from covo_rl.duplex.recorded import RecordedWorld, _fault, take_recorded
from covo_rl.duplex.records import TimingSounds, timing_rows
from covo_rl.duplex.simulate import Simulator
from covo_rl.duplex.stream_files import STEREO, read_streams, write_stream
from covo_rl.duplex.training import question_example
from covo_rl.duplex.trunk import stop_logits
from covo_rl.export.merged import write_merged
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
from covo_rl.resolve import find
from covo_rl.run.timing import run_timing
from covo_rl.speech.grid import RATE
from covo_rl.supervised.duplex_stage import new_duplex_family, teach_duplex

CONFIG = find("recipes", "configs/tiny_duplex.yaml")
#: where the model's sound begins that says SHIFT in chunk 9: 11 chunks of 3840 samples, and the look-ahead of 308
FIRST_SOUND = (11 * 3840 + 308) / RATE
CODES = tuple(range(8))


def reply(codes=CODES, **more):
    return DuplexTurn("model", FIRST_SOUND, FIRST_SOUND + 0.04 * len(codes or CODES), " three", codes=codes, **more)


def user(*fragments, text=" one two"):
    return DuplexTurn("user", fragments[0][0], fragments[-1][1], text, fragments)


#: 40 chunks: the user to 1.2 s, SHIFT in chunk 9, 8 codes are chunks 10 and 11, BREAK in 12; then a turn that pauses
PAUSED = DuplexStream("paused", 6.4, "en", (user((0.4, 1.2)), reply(), user((2.8, 3.0), (3.6, 3.84), text=" five")))
#: the same without what follows a reply of 32 codes, chunks 10 to 17, in which the user says "mm"
HUMMED = DuplexStream("hummed", 4.8, "en", (user((0.4, 1.2)), reply(CODES * 4)),
                      (DuplexMark("back_channel", "user", 2.2, 2.5, "mm"),))  # fmt: skip
SINGLE = DuplexStream("single", 4.8, "en", (user((0.4, 1.2)),))
TEST = [replace(PAUSED, id=f"test-{i}") for i in range(5)] + [replace(SINGLE, id="test-single")]


def write(folder, *streams):
    for number, stream in enumerate(streams):
        noise_T2 = np.random.default_rng([number, *folder.name.encode()]).normal(
            0, 0.05, (round(stream.seconds * RATE), 2)
        )
        write_stream(folder / f"{number:03d}", stream, noise_T2.clip(-1, 1))
    return str(folder)


def saved(family, folder):
    folder.mkdir()
    write_merged(family, folder)


@pytest.fixture(scope="module")
def family():
    return new_duplex_family(32, 2, seed=0, ears=True)


@pytest.fixture(scope="module")
def ids(family):
    return DuplexIds.of(family)


@pytest.fixture(scope="module")
def before_the_second_turn(family, ids):
    """What stands before chunk 13 of PAUSED, without the system block."""
    user_id, first = ids.placeholder, ids.first_code
    three = family.tokenizer(" three")["input_ids"]
    assert len(three) == 1
    return [
        *[user_id, ids.think] * 9, user_id, ids.shift,
        user_id, *three, *range(first, first + 4), user_id, ids.text_pad, *range(first + 4, first + 8),
        user_id, ids.break_,
    ]  # fmt: skip


def options(**more):
    layers = {str(CONFIG): yaml.safe_load(CONFIG.read_text()), "test": {"num_generations": 4, **more}}
    return duplex_options(layers)


# -- questions and lessons -----------------------------------------------------------------------------------------


def test_a_question_has_all_that_was_said_before_it(tmp_path, family, ids, before_the_second_turn):
    world, taken = take_recorded(family, {"rl_data": write(tmp_path, PAUSED)})
    (question,) = world.questions(taken["rl_data"])
    asked, block = question.stream, len(world.prefix)
    assert world.prefix[-1] == ids.audio_bos and block > 1
    assert (asked.kind, asked.first_chunk, asked.decisions, asked.turn_end) == ("pause", 13, 27, 3.84)
    assert asked.pauses == ((3.0, 3.6),) and asked.id == "paused" and asked.cue == ""
    waiting = [*[ids.placeholder, ids.think] * 26, ids.placeholder]
    assert list(question.trunk.ids[block:]) == [*before_the_second_turn, *waiting]
    assert question.trunk.decisions == 27 and len(question.trunk.places) == 40 == len(question.features_UD)


def test_a_question_in_a_reply_is_the_reply(tmp_path, family, ids, before_the_second_turn):
    world, taken = take_recorded(family, {"rl_data": write(tmp_path, HUMMED)})
    (question,) = world.questions(taken["rl_data"])
    asked = question.stream
    assert (asked.kind, asked.first_chunk, asked.decisions) == ("back_channel", 10, 8)
    assert (asked.onset, asked.turn_end) == (2.2, 2.5)
    path = list(question.trunk.ids[len(world.prefix) :])
    assert path[:20] == before_the_second_turn[:20] and path[18:20] == [ids.placeholder, ids.shift]
    # eight chunks of a U and five ids, but nothing follows the last U
    assert len(path) == 20 + 7 * 6 + 1 and len(question.features_UD) == 18
    assert path[20:25] == before_the_second_turn[20:25]
    assert question.trunk.text_open == (True, True, *[False] * 6)


def test_a_lesson_is_the_stream_unless_it_would_teach_silence(tmp_path, family, ids, before_the_second_turn):
    """The second turn of PAUSED is not answered: the lesson ends with the BREAK in chunk 12."""
    world, taken = take_recorded(family, {"sft_data": write(tmp_path, PAUSED, HUMMED)})
    cut, whole = world.lessons(taken["sft_data"])
    assert list(cut.ids[cut.taught_from :]) == before_the_second_turn and cut.ids[: cut.taught_from] == world.prefix
    assert len(cut.places) == 13 == len(cut.features_UD) and len(whole.places) == 30 == len(whole.features_UD)
    assert list(whole.ids[-24:]) == [ids.placeholder, ids.break_, *[ids.placeholder, ids.think] * 11]
    with pytest.raises(ConfigError, match="it would teach silence"):
        take_recorded(family, {"sft_data": write(tmp_path / "mute", SINGLE)})


def test_features_are_those_of_the_users_channel_as_a_session_hears_it(tmp_path, family):
    folder = write(tmp_path, SINGLE)
    world, taken = take_recorded(family, {"rl_data": folder})
    (question,) = world.questions(taken["rl_data"])
    wave_T = question.stream.user_channel()
    encoder = StreamingEncoder.of(family.model)
    live_CD = torch.cat([encoder.push(torch.tensor(wave_T)), encoder.end()])
    assert (live_CD[:30] - question.features_UD).abs().max() < 1e-4
    z_K = stop_logits(family, [question.trunk], [question.features_UD], world.ids)[0]
    assert len(z_K) == 30 and z_K.isfinite().all()


def test_a_text_that_outlasts_its_codes_is_said_before_the_next_question(tmp_path, family):
    """Four ids of text and one chunk of codes: BREAK comes in chunk 14, not 11."""
    wordy = replace(reply(CODES[:4]), text=" one two three four")
    stream = replace(PAUSED, turns=(PAUSED.turns[0], wordy, PAUSED.turns[2]))
    write(tmp_path, stream)
    asked, trunk = RecordedWorld.of(family).ask(stream)
    assert (asked.first_chunk, asked.decisions, trunk.decisions) == (15, 25, 25)


def coded_dialogues(count):
    """Digits whose replies have codes, random ones."""
    dialogues = []
    for dialogue in digit_dialogues("train", count):
        rng = np.random.default_rng(0)
        turns = [
            replace(turn, codes=tuple(rng.integers(0, 44, ceil(len(turn.load()) / 960)).tolist()))
            if turn.channel == "model" else turn for turn in dialogue.turns
        ]  # fmt: skip
        dialogues.append(replace(dialogue, turns=tuple(turns)))
    return dialogues


def test_an_answer_is_of_a_stream_that_ends_with_the_users_turn(tmp_path, family):
    """PAUSED does; what HUMMED should say is what it says. Without one nothing can be compared."""
    answered = replace(PAUSED, answer=" five")
    world, taken = take_recorded(family, {"rl_data": write(tmp_path / "rl", answered, HUMMED)}, answer_chunks=4)
    assert [question.stream.answer for question in world.questions(taken["rl_data"])] == [" five", None]
    with pytest.raises(ConfigError, match="rl_data: 001: it has no `answer`"):
        take_recorded(family, {"rl_data": write(tmp_path / "other", answered, SINGLE)}, answer_chunks=4)
    length = len(world.ask(answered)[1].ids) + 4 * 6
    for limit, problem in ((length, None), (length - 1, f"its {length} positions are more")):
        assert (problem or "") in _fault(replace(world, limit=limit), tmp_path / "rl/000", answered, 4)


def test_simulated_streams_are_questions_and_lessons(tmp_path, family):
    for preset, count in (("rl", 3), ("sft", 1)):
        for number, made in enumerate(Simulator(coded_dialogues(count), PRESETS[preset], 0).streams()):
            write_stream(tmp_path / preset / str(number), *made)
    world, taken = take_recorded(family, {f"{name}_data": str(tmp_path / name) for name in ("rl", "sft")})
    for question, stream in zip(world.questions(taken["rl_data"]), taken["rl_data"].values(), strict=True):
        # digits are said again
        assert question.stream.answer == (stream.turns_of("user")[-1].text if question.stream.listening else None)
        chunks = question.stream.first_chunk + question.stream.decisions
        assert len(question.trunk.places) == chunks == len(question.features_UD) <= round(stream.seconds / 0.16)
    for lesson in world.lessons(taken["sft_data"]):
        assert len(lesson.places) == len(lesson.features_UD) == lesson.ids.count(world.ids.placeholder)


# -- runs ----------------------------------------------------------------------------------------------------------


def test_two_steps_of_rl_from_folders(tmp_path, family):
    saved(family, tmp_path / "model")
    rl, test = write(tmp_path / "rl", PAUSED, HUMMED, SINGLE), write(tmp_path / "test", *TEST)
    run = tmp_path / "run"
    words = {"model": str(tmp_path / "model"), "rl_data": rl, "test_data": test, "output": str(run), "max_steps": 2,
             "prompts_per_step": 3, "micro_batch_prompts": 2, "control": "shuffled"}  # fmt: skip
    result = read_record(run_timing(options(**words)))
    assert result["before"]["streams"] == {"pause": 5, "single": 1} and 0 <= result["probe_auc"] <= 1
    rows = [json.loads(line) for line in (run / "rollouts/step_00001.jsonl").read_text().splitlines()]
    assert sorted({row["id"] for row in rows}) == ["hummed", "paused", "single"] and len(rows) == 12
    paused = next(row for row in rows if row["id"] == "paused")
    assert paused["question"] == " one two [ three]  five (0.60 s) 3.60-3.84 s"
    assert next(row for row in rows if row["clips"])["clips"][0].endswith(", the user")
    assert len([*(run / "clips").iterdir()]) >= 1 and not (run / "sounds").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_stream_is_known_by_its_content_and_not_by_where_it_lies(tmp_path, family):
    world = RecordedWorld.of(family)
    write(tmp_path / "a", SINGLE)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    here, there = ([question_example(q) for q in world.questions(read_streams(tmp_path / name))] for name in ("a", "b"))
    assert here == there
    write(tmp_path / "c", HUMMED, SINGLE)  # other noise
    assert here != [question_example(q) for q in world.questions(read_streams(tmp_path / "c"))][1:]


def test_a_row_shows_fragments_and_keeps_the_users_channel(tmp_path, family):
    world = RecordedWorld.of(family)
    (question,) = world.questions(read_streams(write(tmp_path / "rl", PAUSED)))
    stream, z_K = question.stream, torch.zeros(27)
    kept = TimingSounds(tmp_path / "run").keep(stream, 3)
    assert kept is not None and kept[0] == "paused, the user"
    zeros = np.zeros(28)
    rows = timing_rows([stream], [z_K], [zeros], np.array([[0, 27]]), np.zeros((1, 2)), [{"a": zeros}],
                       sounds={"paused": kept})  # fmt: skip
    spans = [(turn["channel"], turn["start"], turn["end"]) for turn in rows[0]["timing"]["turns"]]
    assert spans == [("user", 0.4, 1.2), ("model", FIRST_SOUND, FIRST_SOUND + 0.32), ("user", 2.8, 3.0),
                     ("user", 3.6, 3.84)]  # fmt: skip
    (tmp_path / "rl/000/stereo.wav").unlink()
    with pytest.raises(OSError, match=r"stereo\.wav"):
        stream.user_channel()


def test_supervised_updates_of_a_folder(tmp_path, family):
    saved(family, tmp_path / "model")
    words = {"model": str(tmp_path / "model"), "sft_data": write(tmp_path / "sft", PAUSED, HUMMED), "sft_steps": 3,
             "sft_batch": 2}  # fmt: skip
    figures = teach_duplex(options(**words), tmp_path / "taught")
    assert figures["steps"] == 3 and figures["single_turn_success"] is None
    # of two streams 13 and 30 chunks, 2 and 8 of them spoken: the first of each has text, the others pads
    assert figures["targets_decision"] == 43 - 10 and figures["targets_code"] == 40 and figures["targets_text"] == 10


# -- what is refused -----------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_named_at_once(tmp_path, family):
    """No codes; nothing asked; a turn that the stream ends with; no test streams of a kind; the same stream twice."""
    mute = replace(HUMMED, id="mute", turns=(HUMMED.turns[0], replace(reply(CODES * 4), codes=None)))
    empty, over = DuplexStream("empty", 1.6), replace(SINGLE, id="over", seconds=1.28)
    folders = {"rl_data": write(tmp_path / "rl", mute, empty, over, SINGLE), "test_data": write(tmp_path / "t", SINGLE)}
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError) as caught:
        take_recorded(family, {**folders, "sft_data": str(tmp_path / "nothing")})
    said = str(caught.value)
    for what in ("rl_data: 000: the model speaks and events.json has no codes", "001: it asks nothing",
                 "002: it ends with the user's turn", "test_data: 0 streams end with a question of kind pause",
                 "003 of rl_data", "no stream: expected folders"):  # fmt: skip
        assert what in said, said
    with pytest.raises(ConfigError) as caught:
        take_recorded(family, folders, allow_overlap=True)
    assert "in common" not in str(caught.value)


def test_the_sound_of_a_test_stream_is_found_under_another_name(tmp_path, family):
    folders = {"rl_data": write(tmp_path / "rl", SINGLE, PAUSED), "test_data": write(tmp_path / "t", *TEST)}
    take_recorded(family, folders)
    shutil.copy(tmp_path / "t" / "000" / STEREO, tmp_path / "rl" / "001")
    with pytest.raises(ConfigError, match="sounds in common: 001 of rl_data"):
        take_recorded(family, folders)
    take_recorded(family, folders, allow_overlap=True)


def test_a_model_that_is_not_of_full_duplex_is_refused_with_the_streams(tmp_path):
    family = new_duplex_family(32, 2, seed=0)
    family.model.config.duplex = None
    mute = replace(HUMMED, turns=(HUMMED.turns[0], replace(reply(CODES * 4), codes=None)))
    with pytest.raises(ConfigError) as caught:
        take_recorded(family, {"rl_data": write(tmp_path, mute)})
    assert "covo-rl duplex prepare" in str(caught.value) and "no codes" in str(caught.value)


def test_codes_and_lengths_that_the_model_cannot_have_are_refused(tmp_path, family, monkeypatch):
    folder = write(tmp_path, replace(HUMMED, turns=(HUMMED.turns[0], reply((44, *CODES * 4)[:32]))))
    with pytest.raises(ConfigError, match="code 44"):
        take_recorded(family, {"rl_data": folder})
    monkeypatch.setattr("covo_rl.duplex.recorded.position_limit", lambda config: 50)
    with pytest.raises(ConfigError, match="more than the model's 50"):
        take_recorded(family, {"rl_data": write(tmp_path / "long", SINGLE)})


def test_nothing_is_written_where_streams_cannot_be_used(tmp_path, family):
    saved(family, tmp_path / "model")
    words = {"model": str(tmp_path / "model"), "rl_data": str(tmp_path / "gone"), "test_data": str(tmp_path / "gone")}
    with pytest.raises(ConfigError, match="rl_data"):
        run_timing(options(**words, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [({"model": "m", "rl_data": "a"}, "rl_data and test_data go together"),
     ({"model": "m", "rl_data": "a", "test_data": "b", "control": "gold"}, "control gold"),
     ({"model": "m", "rl_data": "a", "test_data": "b", "control": "no_cue"}, "control no_cue"),
     ({"sft_data": "a"}, "set features to wav"),
     ({"features": "wav", "rl_data": "a", "test_data": "b"}, "name sft_data too")],
)  # fmt: skip
def test_options_that_contradict_each_other(given, said):
    with pytest.raises(ConfigError, match=said):
        options(**given)
