"""How a simulated stream sounds: the user's words where its percepts are, and a model that speaks from its SHIFT on.

    user_T = user_wave(stream)                          as an encoder would hear it; no two samples in a row are zeros
    both_T2 = stream_sound(stream, stop)                left the user, right the model, which stops there
    write_sound(folder, stream, stop)                   the same as stereo.wav, with its events.json

A stream of features.py has no replies of listening models in it, as learning when to speak needs none: here the model
says the digits that it has heard until its SHIFT, whatever the policy would have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from covo_rl.duplex.data import DuplexMark, DuplexStream, DuplexTurn
from covo_rl.duplex.features import FUNCTION_WORD, FeatureStream, Sound
from covo_rl.duplex.grid import CHUNK_SAMPLES, chunk_of, sound_start
from covo_rl.duplex.rollout import TimingStream, stop_generator
from covo_rl.duplex.sound import faded_end, fit_length, noise_floor, two_channels
from covo_rl.duplex.stream_files import write_stream
from covo_rl.speech.grid import RATE
from covo_rl.synth.speech import DIGITS, SPEECH_SPLITS, Speaker, speakers
from covo_rl.synth.timed import LOUDNESS, TimedWord, say_timed

#: what each word of features.py is called
WORD_NAMES = (*DIGITS, "and", "mm")
#: semitones and dB of a movement of 1
PITCH_SEMITONES, FALL_DB = 5.0, 10.0
#: of a model's reply: seconds from word to word where nothing else says, of a word at most, of one that is cut at least
WORD_SECONDS, LONGEST_WORD, LEAST_WORD = 0.36, 0.45, 0.05
#: dB of the room's tone below the user's words
SNR_DB = (20.0, 40.0)


def user_wave(stream: FeatureStream, *, seed: int = 0, split: str = "train") -> np.ndarray:
    """float32 (chunks * CHUNK_SAMPLES,) at 24 kHz: the user's channel. Voice and noise hang on `seed` and the id.

    `split` is that of the voices: no voice of a test is in training.
    """
    rng, samples = stop_generator(seed, stream.id, 3), stream.chunks * CHUNK_SAMPLES
    voice = _voices(split)[1 + int(rng.integers(len(_voices(split)) - 1))]
    level = LOUDNESS * 10 ** (-rng.uniform(*SNR_DB) / 20)
    wave_T = noise_floor(samples, level, stop_generator(seed, stream.id, 4))
    for words in _fragments(user_words(stream)):
        start, piece_T = fit_length(say_timed(words, voice, rng), round(words[0].start * RATE), samples)
        wave_T[start : start + len(piece_T)] += piece_T
    return (wave_T * min(1.0, 0.99 / float(np.abs(wave_T).max()))).astype(np.float32)


def stream_sound(stream: FeatureStream, stop: int, *, seed: int = 0, split: str = "train") -> np.ndarray:
    """(T, 2) float32 of a rollout that stopped there (`decisions`: never), until both have said all they say."""
    words = model_words(stream, stop)
    last = chunk_of(max(stream.sounds[-1].end, *(word.end for word in words)) if words else stream.sounds[-1].end)
    user_T = user_wave(replace(stream, chunks=max(stream.chunks, last + 1)), seed=seed, split=split)
    model_T = np.zeros(len(user_T))
    if words:
        start, end = round(words[0].start * RATE), round(words[-1].end * RATE)
        wave_T = faded_end(say_timed(words, _voices(split)[0], stop_generator(seed, stream.id, 5))[: end - start])
        model_T[start : start + len(wave_T)] = wave_T
    return two_channels(user_T, model_T)


def speech_span(stream: TimingStream, stop: int) -> tuple[float, float | None] | None:
    """From when to when the model of such a rollout sounds, in seconds: an answer has no end that stopping tells; None
    where it never does."""
    chunk, first = stream.chunk(stop), stream.first_chunk
    if stream.listening:
        return None if chunk is None else (sound_start(chunk + 1) / RATE, None)
    last = first + stream.decisions if chunk is None else chunk
    return (sound_start(first) / RATE, sound_start(last) / RATE) if last > first else None


def model_words(stream: FeatureStream, stop: int) -> list[TimedWord]:
    """What the model of such a rollout says, as far as it comes."""
    if (span := speech_span(stream, stop)) is None:
        return []
    if span[1] is None:
        heard = [sound.word for sound in stream.sounds if sound.end <= span[0] and sound.word < FUNCTION_WORD]
        words, every, end = heard or [0], WORD_SECONDS, float("inf")  # who heard nothing says "zero"
    else:
        words, end = stream.reply, span[1]
        every = (sound_start(stream.first_chunk + stream.decisions) / RATE - span[0]) / max(len(words), 1)
    edges = [span[0] + every * place for place in range(len(words) + 1)]
    return [TimedWord(WORD_NAMES[word], start, min(start + LONGEST_WORD, after, end))
            for word, (start, after) in zip(words, pairwise(edges), strict=True)
            if start < end - LEAST_WORD]  # fmt: skip


def user_words(stream: FeatureStream) -> list[TimedWord]:
    """What the user says, named and in seconds."""
    return [_heard(sound) for sound in stream.sounds]


def sound_events(stream: FeatureStream, stop: int, seconds: float, *, seed: int = 0) -> DuplexStream:
    """What events.json says of `stream_sound`: turns of both, pauses, and what the user did while the model spoke."""
    words = user_words(stream)
    later = [] if stream.onset is None else [word for word in words if word.start >= stream.onset - 1e-6]
    turns = [_user_turn(words[: len(words) - len(later)])]
    marks = [DuplexMark("pause", "user", start, end) for start, end in stream.pauses]
    if stream.kind == "back_channel":
        marks += [DuplexMark("back_channel", "user", word.start, word.end, word.text) for word in later]
    elif later:
        turns.append(_user_turn(later))
        marks.append(DuplexMark("barge_in", "user", later[0].start, later[-1].end))
    if said := model_words(stream, stop):
        cut = None if stream.listening or stop >= stream.decisions else said[-1].end
        turns.append(DuplexTurn("model", said[0].start, said[-1].end, _text(said), interrupted_at=cut))
    order = tuple(sorted(turns, key=lambda turn: turn.start))
    return DuplexStream(stream.id, seconds, "en", order, tuple(marks), (stream.id,), seed)


def write_sound(folder: Path, stream: FeatureStream, stop: int, *, seed: int = 0, split: str = "train") -> None:
    """Write stereo.wav and events.json of a rollout that stopped there into `folder`."""
    both_T2 = stream_sound(stream, stop, seed=seed, split=split)
    write_stream(folder, sound_events(stream, stop, len(both_T2) / RATE, seed=seed), both_T2)


@cache
def _voices(split: str) -> list[Speaker]:
    """Of a split; the first is the model's."""
    return speakers(SPEECH_SPLITS.get(split, 1), 0, split)


def _heard(sound: Sound) -> TimedWord:
    name, moves = WORD_NAMES[sound.word], (PITCH_SEMITONES * sound.pitch, FALL_DB * sound.fall)
    return TimedWord(name, sound.start, sound.end, sound.level, *moves)


def _fragments(words: Sequence[TimedWord]) -> list[list[TimedWord]]:
    """Words that follow one another without a gap."""
    fragments: list[list[TimedWord]] = []
    for word in words:
        if fragments and word.start - fragments[-1][-1].end < 1e-6:
            fragments[-1].append(word)
        else:
            fragments.append([word])
    return fragments


def _user_turn(words: Sequence[TimedWord]) -> DuplexTurn:
    spans = tuple((part[0].start, part[-1].end) for part in _fragments(words))
    return DuplexTurn("user", words[0].start, words[-1].end, _text(words), spans)


def _text(words: Sequence[TimedWord]) -> str:
    return " ".join(word.text for word in words)
