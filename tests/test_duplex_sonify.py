"""How simulated streams sound: words at their times, pitch and level that move as percepts do, no digital silence."""

import numpy as np
import pytest

from covo_rl.duplex.features import FUNCTION_WORD, HUM, FeatureStream, Sound, draw_streams
from covo_rl.duplex.grid import CHUNK_SAMPLES, sound_start
from covo_rl.duplex.sonify import WORD_NAMES, model_words, speech_span, stream_sound, user_wave, write_sound
from covo_rl.duplex.stream_files import read_stream
from covo_rl.speech.grid import RATE
from covo_rl.speech.pitch import track_f0
from covo_rl.synth.speech import speakers
from covo_rl.synth.timed import TimedWord, say_timed

VOICE = speakers(1)[0]


def listening(*sounds, pauses=()):
    """A stream of 20 chunks (3.2 s) in which the user says these words."""
    return FeatureStream(
        id="hand", kind="pause" if pauses else "single", first_chunk=0, decisions=20, chunks=20, sounds=sounds,
        turn_end=sounds[-1].end, pauses=pauses, shift_chunk=12, gold_stop=12,
    )  # fmt: skip


PAUSED = listening(Sound(0.32, 0.64, 2), Sound(0.64, 0.96, FUNCTION_WORD), Sound(1.92, 2.24, 7), pauses=((0.96, 1.92),))


def level(wave_T, start, end):
    """dB of the samples between two seconds."""
    return 10 * np.log10(np.mean(wave_T[round(start * RATE) : round(end * RATE)].astype(float) ** 2))


def longest_run(wave_T):
    """Of equal samples, as 16 bits hold them."""
    edges = np.flatnonzero(np.diff(np.round(wave_T * 32_767), prepend=np.inf, append=np.inf))
    return int(np.diff(edges).max())


def test_words_are_loud_at_their_times_and_pauses_hold_the_room():
    wave_T = user_wave(PAUSED)
    assert len(wave_T) == 20 * CHUNK_SAMPLES and np.abs(wave_T).max() < 1
    speech = min(level(wave_T, *span) for span in ((0.32, 0.96), (1.92, 2.24)))
    room = max(level(wave_T, *span) for span in ((0, 0.3), (1.05, 1.9), (2.35, 3.2)))
    assert speech > room + 15
    assert longest_run(wave_T) < 0.001 * RATE


def test_the_room_is_as_loud_in_the_pause_as_after_the_turn():
    wave_T = user_wave(PAUSED)
    assert level(wave_T, 1.05, 1.9) == pytest.approx(level(wave_T, 2.35, 3.2), abs=1.0)


@pytest.mark.parametrize(("pitch", "ratio"), [(-5.0, 0.75), (0.0, 1.0), (3.5, 1.22)])
def test_pitch_moves_by_so_many_semitones_in_a_word(pitch, ratio):
    wave_T = say_timed([TimedWord("nine", 0.0, 0.5, pitch=pitch)], VOICE, np.random.default_rng(0))
    f0_Z = track_f0(wave_T, RATE)
    voiced = np.flatnonzero(f0_Z[:50])
    assert f0_Z[voiced[-5:]].mean() / f0_Z[voiced[:5]].mean() == pytest.approx(ratio, abs=0.07)


def test_level_falls_by_so_many_decibels_and_words_have_theirs():
    def said(**moves):
        return say_timed([TimedWord("mm", 1.0, 1.6, **moves)], VOICE, np.random.default_rng(0))

    assert level(said(level=0.5), 0, 0.6) == pytest.approx(level(said(), 0, 0.6) - 6.02, abs=0.01)
    assert level(said(fall=10), 0.5, 0.6) == pytest.approx(level(said(), 0.5, 0.6) - 10 * 0.55 / 0.6, abs=0.2)


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "expected one or more of zero"), ([("ten", 0, 1)], "'ten'"), ([("one", 0, 1), ("two", 0.9, 2)], "overlap")],
)
def test_what_nobody_can_say_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        say_timed([TimedWord(*word) for word in words], VOICE, np.random.default_rng(0))


def test_a_stream_sounds_the_same_whatever_else_is_made_and_voices_are_of_their_split():
    again = user_wave(PAUSED)
    assert (user_wave(PAUSED) == again).all()
    assert (user_wave(PAUSED, seed=1) != again).any() and (user_wave(PAUSED, split="test") != again).any()


def test_an_early_answer_overlaps_the_user_and_says_what_was_heard_by_then():
    early, late = stream_sound(PAUSED, 7), stream_sound(PAUSED, 15)
    start = sound_start(8)  # SHIFT in chunk 7, codes of chunk 8 sound in chunk 9
    assert speech_span(PAUSED, 7) == (start / RATE, None) and 1.44 < start / RATE < 1.46
    assert [word.text for word in model_words(PAUSED, 7)] == ["two"]
    assert [word.text for word in model_words(PAUSED, 15)] == ["two", "seven"]
    assert not early[:start, 1].any() and early[start : start + RATE // 4, 1].any()
    assert not late[: sound_start(16), 1].any() and len(late) > len(early)  # until the reply is over
    assert level(early[: len(early), 0] - late[: len(early), 0], 0, 3) < level(early[:, 0], 0, 0.3) + 4  # words alike
    assert longest_run(late[:, 0]) < 0.001 * RATE


def test_who_never_answers_is_silent_and_who_heard_nothing_says_zero():
    assert not stream_sound(PAUSED, 20)[:, 1].any() and model_words(PAUSED, 20) == []
    assert [word.text for word in model_words(PAUSED, 0)] == ["zero"]


def test_words_of_a_reply_never_overlap():
    for stream in draw_streams("test", {"pause": 60, "hold": 60}, seed=1):
        edges = [second for word in model_words(stream, stream.decisions - 1) for second in (word.start, word.end)]
        assert len(edges) and edges == sorted(edges)


def test_a_break_cuts_the_reply_where_its_last_codes_end():
    stream = FeatureStream(
        id="b", kind="back_channel", first_chunk=5, decisions=12, chunks=22, turn_end=1.9, onset=1.6, reply=(3, 1, 4),
        sounds=(Sound(0.1, 0.4, 3), Sound(1.6, 1.9, HUM)), shift_chunk=4, gold_stop=12,
    )  # fmt: skip
    whole, cut = stream_sound(stream, 12)[:, 1], stream_sound(stream, 6)[:, 1]
    end = sound_start(11)
    assert [word.text for word in model_words(stream, 6)] == ["three", "one"]
    assert whole[end:].any() and not cut[end:].any() and (cut[: end - RATE // 50] != 0).any()
    assert speech_span(stream, 6) == (sound_start(5) / RATE, end / RATE) and speech_span(stream, 0) is None


@pytest.mark.parametrize(
    ("kind", "stop"), [("pause", 6), ("pause", 10**6), ("barge_in", 6), ("back_channel", 10**6), ("hold", 0)]
)
def test_every_kind_is_written_with_events_that_can_be_read_again(kind, stop, tmp_path):
    stream = draw_streams("rl", {kind: 1}, seed=3)[0]
    write_sound(tmp_path, stream, min(stop, stream.decisions))
    events, wave_T2 = read_stream(tmp_path)
    assert events.seconds * RATE == pytest.approx(len(wave_T2)) and events.source == (stream.id,)
    said = " ".join(turn.text for turn in events.turns_of("user"))
    assert said.split() == [WORD_NAMES[sound.word] for sound in stream.sounds if sound.word != HUM]
    assert [(mark.start, mark.end) for mark in events.marks("pause")] == [*stream.pauses]
    replies = events.turns_of("model")
    assert len(replies) == (stop < 10**6 if stream.listening else stop > 0)
    interrupted = not stream.listening and 0 < stop < stream.decisions
    assert [turn.interrupted_at is not None for turn in replies] == [interrupted] * len(replies)


def test_every_stream_sounds_wherever_it_stops():
    """Words follow one another without a gap: their times differ by rounding."""
    for stream in draw_streams("rl", 60, seed=11):
        stops = {stream.decisions, stream.decisions // 2, stream.decisions - 1}
        assert all(len(stream_sound(stream, stop)) for stop in stops)
