"""A clip becomes one float32 channel at its own rate, or one AudioError."""

from __future__ import annotations

import io
import os
import stat
from typing import Any

import numpy as np
import soundfile

from covo_rl.audio.container import missing_end
from covo_rl.types import Clip

#: Shorter clips hold less than one analysis window of any model.
MIN_SECONDS = 0.01
#: Rates outside are damaged headers: resampling to or from them would take unbounded memory.
MIN_RATE, MAX_RATE = 2_000, 768_000
#: Values of all channels together; 1 GiB as float32, 93 minutes at 48 kHz mono.
MAX_SAMPLES = 2**28
FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")
_BLOCK = 2**20
#: A float waveform beyond this is integer PCM that nobody scaled.
_MAX_PEAK = 100.0


class AudioError(ValueError):
    """A clip that cannot be used. The message starts with the clip's name."""


def decode(clip: Clip) -> tuple[np.ndarray, int]:
    """The waveform of a clip, float32 (samples,), and its sampling rate in Hz.

    Files are wav, flac, mp3, ogg (Vorbis, Opus), aiff, au or caf. Integer PCM is scaled to [-1, 1), float is kept.

    Raises:
        AudioError: missing, unreadable, truncated, empty or under 10 ms; more than two channels; NaN or infinite
            samples; an impossible sampling rate; too large to hold (2**28 values).
    """
    if clip.array is not None:
        values, rate = _scaled(clip), clip.sampling_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)):
            raise AudioError(f"{clip.name}: the sampling rate is {rate!r}, not a whole number of Hz")
        rate = int(rate)
    else:
        values, rate = _read(clip)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{clip.name}: a sampling rate of {rate} Hz; audio has {MIN_RATE} to {MAX_RATE} Hz")
    waveform = to_mono(values, clip.name)
    _check(waveform, rate, clip.name)
    return waveform, rate


def to_mono(values: np.ndarray, name: str = "<array>") -> np.ndarray:
    """(samples,) or (samples, channels) -> (samples,). Four cases, the last two refusals.

    Raises:
        AudioError: no channel, more than two channels, or two that cancel out.
    """
    channels = 1 if values.ndim == 1 else values.shape[1]
    # 1. One channel: as it is.
    if channels == 1:
        return values.reshape(-1)
    # 2. Two channels: their average, unless that leaves nothing of them.
    if channels == 2:
        mono = (values[:, 0] + values[:, 1]) * np.float32(0.5)
        loudest = float(np.abs(values).max(initial=0.0))
        if loudest > 0 and float(np.abs(mono).max()) < 1e-4 * loudest:
            raise AudioError(f"{name}: its two channels cancel out when averaged; store one of them")
        return mono
    # 3. No channel at all.
    if channels == 0:
        raise AudioError(f"{name}: it has no channels")
    # 4. More: which of them carry the scene is not ours to guess.
    hint = "; the shape should be (samples, channels)" if channels > len(values) else ""
    raise AudioError(f"{name}: it has {channels} channels, one or two are read; mix it down first{hint}")


def resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Band-limited resampling (soxr HQ) of float32 (samples,), from `rate` to `new_rate` Hz.

    Returns float32 of about samples * new_rate / rate values. A family whose training specifies another resampler
    uses that one.

    Raises:
        ValueError: a rate outside MIN_RATE to MAX_RATE, or not one-dimensional.
    """
    for value in (rate, new_rate):
        if not MIN_RATE <= value <= MAX_RATE:
            raise ValueError(f"cannot resample from {rate} to {new_rate} Hz: rates are {MIN_RATE} to {MAX_RATE} Hz")
    if waveform.ndim != 1:
        raise ValueError(f"resample takes (samples,), got shape {waveform.shape}")
    if rate == new_rate:
        return waveform
    import soxr

    return np.asarray(soxr.resample(waveform, rate, new_rate, quality="HQ"), dtype=np.float32)


def _check(waveform: np.ndarray, rate: int, name: str) -> None:
    if not len(waveform):
        raise AudioError(f"{name}: it holds no samples")
    if len(waveform) < MIN_SECONDS * rate:
        raise AudioError(f"{name}: {1000 * len(waveform) / rate:.1f} ms long; at least {1000 * MIN_SECONDS:.0f} ms")
    # One pass: the sum of finite float32 values in float64 cannot overflow.
    with np.errstate(invalid="ignore"):
        total = waveform.sum(dtype=np.float64)
    if not np.isfinite(total):
        bad = int((~np.isfinite(waveform)).sum())
        raise AudioError(f"{name}: {bad} of {len(waveform)} samples are NaN or infinite")
    peak = max(float(waveform.max()), -float(waveform.min()))
    if peak > _MAX_PEAK:
        raise AudioError(f"{name}: float samples reach {peak:g}; scale them to [-1, 1]")


def _scaled(clip: Clip) -> np.ndarray:
    """The array of a clip as float32, integer PCM divided by its full scale."""
    array = np.asarray(clip.array)
    if array.ndim not in (1, 2):
        raise AudioError(f"{clip.name}: an array is (samples,) or (samples, channels), not {array.shape}")
    if array.size > MAX_SAMPLES:
        raise AudioError(f"{clip.name}: {array.size} values; at most {MAX_SAMPLES}")
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if array.dtype in (np.int8, np.int16, np.int32):
        return array.astype(np.float32) / float(2 ** (8 * array.dtype.itemsize - 1))
    if array.dtype.kind != "f":
        raise AudioError(f"{clip.name}: samples of type {array.dtype}; use float, int16, int32 or uint8")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _read(clip: Clip) -> tuple[np.ndarray, int]:
    """Decode a file: float32 (samples, channels) and its rate."""
    with _open(clip) as file:
        if not 1 <= file.channels <= 2:
            to_mono(np.empty((file.channels + 1, file.channels), dtype=np.float32), clip.name)
        values = _blocks(file, clip.name)
        container, expected, rate = file.format, file.frames, file.samplerate
    with io.BytesIO(clip.data) if clip.data is not None else open(regular_file(clip), "rb") as stream:
        loss = missing_end(stream, container, len(values), expected)
    if loss:
        raise AudioError(f"{clip.name}: truncated, {loss}")
    return values, rate


def _blocks(file: soundfile.SoundFile, name: str) -> np.ndarray:
    """Everything that can be decoded. In blocks, since the length in a damaged header may be astronomical."""
    blocks, total = [], 0
    size = max(1, min(_BLOCK, file.frames))
    while True:
        try:
            block = file.read(size, dtype="float32", always_2d=True)
        except (RuntimeError, OSError, ValueError) as error:
            raise AudioError(f"{name}: cannot be decoded after {total} samples: {error}") from error
        if not len(block):
            break
        blocks.append(block)
        total += len(block)
        if total * file.channels > MAX_SAMPLES:
            raise AudioError(f"{name}: over {MAX_SAMPLES} values, about {total / file.samplerate / 60:.0f} minutes")
        if len(block) < size:
            break
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks or [np.zeros((0, 1), dtype=np.float32)])


def _open(clip: Clip) -> soundfile.SoundFile:
    """An open file of a known container with a plausible rate."""
    source: Any = io.BytesIO(clip.data) if clip.data is not None else regular_file(clip)
    try:
        file = soundfile.SoundFile(source)
    # TypeError: a headerless .raw file; ValueError: a NUL in the path.
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"Error opening {source!r}: ")
        raise AudioError(f"{clip.name}: not readable as audio: {reason}") from error
    if file.format in FORMATS and file.samplerate > 0:
        return file
    found = f"{file.format} at {file.samplerate} Hz"
    file.close()
    raise AudioError(f"{clip.name}: {found} is not read; use {', '.join(FORMATS[3:6] + FORMATS[:1])}")


def regular_file(clip: Clip) -> str:
    """The path of a clip; AudioError where it is not that of a file."""
    # A pipe or device would block for ever.
    if not stat.S_ISREG(file_status(clip).st_mode):
        raise AudioError(f"{clip.name}: not a regular file")
    return clip.name


def file_status(clip: Clip) -> os.stat_result:
    """What the system says of a clip's file; AudioError where there is none."""
    try:
        return os.stat(clip.name)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AudioError(f"{clip.name}: cannot be opened: {reason}") from error
