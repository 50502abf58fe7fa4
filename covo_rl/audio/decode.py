"""A clip becomes one float32 channel at its own rate, or one AudioError.

libsndfile reads a cut wav, aiff or ogg without a word, so the container is asked whether the end is missing. RIFF/RF64
(EBU Tech 3306) and AIFF are lists of sized chunks; every Ogg page (RFC 3533) starts with `OggS` and the last page of a
stream carries the end-of-stream flag.
"""

from __future__ import annotations

import io
import os
import stat
from typing import BinaryIO, Literal

import numpy as np
import soundfile

from covo_rl.types import Clip, UserError

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
#: Writers that cannot seek back leave these instead of a size.
_UNKNOWN_SIZES = (0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x7FFFFFFE)
_MAX_CHUNKS = 10_000
#: Some writers count their own header as samples.
_HEADER_BYTES = 64
_OGG_PAGE = 27 + 255 + 255 * 255
#: An mp3 counts frames of 1,152 samples, the header frame and the decoder's delay perhaps among them.
_MP3_SLACK = 2 * 1_152


class AudioError(UserError, ValueError):
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
    if not len(waveform):
        raise AudioError(f"{clip.name}: it holds no samples")
    if len(waveform) < MIN_SECONDS * rate:
        raise AudioError(
            f"{clip.name}: {1000 * len(waveform) / rate:.1f} ms long; at least {1000 * MIN_SECONDS:.0f} ms"
        )
    # One pass: the sum of finite float32 values in float64 cannot overflow.
    with np.errstate(invalid="ignore"):
        total = waveform.sum(dtype=np.float64)
    if not np.isfinite(total):
        bad = int((~np.isfinite(waveform)).sum())
        raise AudioError(f"{clip.name}: {bad} of {len(waveform)} samples are NaN or infinite")
    peak = max(float(waveform.max()), -float(waveform.min()))
    if peak > _MAX_PEAK:
        raise AudioError(f"{clip.name}: float samples reach {peak:g}; scale them to [-1, 1]")
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
    """Decode a file of a known container with a plausible rate: float32 (samples, channels) and its rate."""
    source = io.BytesIO(clip.data) if clip.data is not None else regular_file(clip)
    try:
        file = soundfile.SoundFile(source)
    # TypeError: a headerless .raw file; ValueError: a NUL in the path.
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"Error opening {source!r}: ")
        raise AudioError(f"{clip.name}: not readable as audio: {reason}") from error
    with file:
        if file.format not in FORMATS or file.samplerate <= 0:
            use = ", ".join(FORMATS[3:6] + FORMATS[:1])
            raise AudioError(f"{clip.name}: {file.format} at {file.samplerate} Hz is not read; use {use}")
        if not 1 <= file.channels <= 2:
            to_mono(np.empty((file.channels + 1, file.channels), dtype=np.float32), clip.name)
        values = _blocks(file, clip.name)
    with open(source, "rb") if isinstance(source, str) else source as stream:
        loss = _missing_end(stream, file.format, len(values), file.frames)
    if loss:
        raise AudioError(f"{clip.name}: truncated, {loss}")
    return values, file.samplerate


def _blocks(file: soundfile.SoundFile, name: str) -> np.ndarray:
    """Everything that can be decoded. In blocks, since the length in a damaged header may be astronomical."""
    blocks, total, size = [], 0, max(1, min(_BLOCK, file.frames))
    while not blocks or len(blocks[-1]) == size:
        try:
            blocks.append(file.read(size, dtype="float32", always_2d=True))
        except (RuntimeError, OSError, ValueError) as error:
            raise AudioError(f"{name}: cannot be decoded after {total} samples: {error}") from error
        total += len(blocks[-1])
        if total * file.channels > MAX_SAMPLES:
            raise AudioError(f"{name}: over {MAX_SAMPLES} values, about {total / file.samplerate / 60:.0f} minutes")
    return blocks[0] if total == len(blocks[0]) else np.concatenate(blocks)


def _missing_end(stream: BinaryIO, container: str, decoded: int, expected: int) -> str:
    """What says that the end is missing, or an empty string.

    `container` is soundfile's name of the format, `expected` the samples that its header promises.
    """
    stream.seek(0)
    if container in ("WAV", "WAVEX", "RF64"):
        return _short_chunk(stream, b"data", "big" if stream.read(4) == b"RIFX" else "little")
    if container == "AIFF":
        return _short_chunk(stream, b"SSND", "big")
    if container == "OGG":
        return _cut_page(stream)
    slack = {"FLAC": 0, "MP3": _MP3_SLACK}.get(container, expected)
    is_short = decoded < expected - slack and (container == "FLAC" or _states_length(stream))
    return f"{decoded} of {expected} samples can be decoded" if is_short else ""


def _short_chunk(stream: BinaryIO, name: bytes, order: Literal["big", "little"]) -> str:
    """Walk the chunks up to the one that holds the samples and compare its size with what follows."""
    size = stream.seek(0, os.SEEK_END)
    place, long_size = 12, 0
    for _ in range(_MAX_CHUNKS):
        if place + 8 > size:
            break
        stream.seek(place)
        header = stream.read(8)
        length = int.from_bytes(header[4:], order)
        if header[:4] == b"ds64":
            long_size = int.from_bytes(stream.read(16)[8:], "little")
        if header[:4] == name:
            length = long_size if length in _UNKNOWN_SIZES else length
            there = size - place - 8
            short = length > there + _HEADER_BYTES
            return f"its header promises {length} bytes of samples, {there} follow" if short else ""
        place += 8 + length + length % 2
    return ""


def _cut_page(stream: BinaryIO) -> str:
    """Whether the last page is whole and says that it is the last."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _OGG_PAGE - 27))
    tail = stream.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    table = page[27 : 27 + page[26]] if len(page) >= 27 else b""
    if not page.startswith(b"OggS") or len(page) < 27 or len(page) < 27 + page[26] + sum(table):
        return "its last Ogg page is cut"
    return "" if page[5] & 0x04 else "its last Ogg page does not end the stream"


def _states_length(stream: BinaryIO) -> bool:
    """Whether the first mp3 frame is a Xing or Info header; without it the length is estimated from the size."""
    stream.seek(0)
    head = stream.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    stream.seek(start)
    frame = stream.read(2_048)
    return b"Xing" in frame or b"Info" in frame


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
