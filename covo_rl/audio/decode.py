"""A clip becomes one float32 channel at its own rate, or one AudioError: never a part of it, never silence."""

from __future__ import annotations

import io
import os
import stat

import numpy as np
import soundfile

from covo_rl.audio.container import whole_file
from covo_rl.audio.foreign import conversion, explain, is_gsm
from covo_rl.audio.media import Media, decode_media, media_kind
from covo_rl.audio.streams import PartError
from covo_rl.types import Clip, UserError

#: Shorter clips hold less than one analysis window of any model.
MIN_SECONDS = 0.01
#: Longer ones are a decompression bomb or a recording that should be cut; checked by the header and while decoding.
MAX_SECONDS = 3_600
#: Rates outside are damaged headers: resampling to or from them would take unbounded memory.
MIN_RATE, MAX_RATE = 2_000, 768_000
#: Values of all channels together; 1 GiB as float32, 46 minutes at 48 kHz stereo.
MAX_SAMPLES = 2**28
#: Of an encoded file.
MAX_BYTES = 2**31
FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "RAW")
_BLOCK = 2**20
#: A float waveform beyond this is integer PCM that nobody scaled.
_MAX_PEAK = 100.0
#: An mp3 counts frames of 1,152 samples, the decoder's delay perhaps among them.
_MP3_SLACK = 2 * 1_152
#: Two channels cancel out where their average has less than this share of their power (20 dB), which sound of two
#: microphones has nowhere and a lossy copy of antiphase everywhere; so much of a clip may.
_CANCELLED, _MAX_CANCELLED = 0.01, 0.3
_WINDOW = 512
_WHOLE = "copy the file again, or write it anew: `ffmpeg -i IN OUT.wav`"
_RATE = f"a sampling rate of {{}} Hz; audio has {MIN_RATE} to {MAX_RATE} Hz"
_USE = "wav, flac, mp3, ogg, aiff, au or caf (`ffmpeg -i IN OUT.wav`)"


class AudioError(UserError, ValueError):
    """A clip that cannot be used. The message starts with the clip's name."""


def decode(clip: Clip) -> tuple[np.ndarray, int]:
    """The waveform of a clip, float32 (samples,), and its sampling rate in Hz.

    Files are wav, flac, mp3, ogg (Vorbis, Opus, FLAC), aiff, au, caf or gsm; with PyAV (`covo-rl[media]`) also m4a,
    mp4, mov, webm, mkv, wma and aac. Integer PCM is scaled to [-1, 1), float is kept.

    Raises:
        AudioError: missing, unreadable, truncated, empty or under 10 ms; several recordings in one file; more than two
            channels, or two that cancel out; NaN or infinite samples; an impossible sampling rate; over MAX_SECONDS
            or MAX_SAMPLES.
    """
    if clip.array is None:
        return decode_stored(stored_bytes(clip), clip.name)
    rate = clip.sampling_rate
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)):
        raise AudioError(f"{clip.name}: the sampling rate is {rate!r}, not a whole number of Hz")
    return _sound(_scaled(clip.array, clip.name), int(rate), clip.name)


def decode_channels(clip: Clip) -> tuple[np.ndarray, int]:
    """The channels of an encoded file apart, float32 (samples, channels), and its sampling rate in Hz.

    Raises:
        AudioError: as `decode`, but for channels that cancel out.
    """
    values, rate = _read(stored_bytes(clip), clip.name)
    for channel in values.T:
        _sound(channel, rate, clip.name)
    return values, rate


def decode_stored(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """`decode` of an encoded file in memory; `name` is for messages."""
    try:
        return _sound(*_read(data, name), name)
    except MemoryError as error:
        raise AudioError(f"{name}: it does not fit into memory when decoded; cut it into several files") from error


def _sound(values: np.ndarray, rate: int, name: str) -> tuple[np.ndarray, int]:
    """Samples that can be used as one channel: long enough, finite, scaled."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name}: {_RATE.format(rate)}")
    if not len(values):
        raise AudioError(f"{name}: it holds no samples")
    if values.shape[0] < MIN_SECONDS * rate and (values.ndim == 1 or values.shape[1] <= 2):
        raise AudioError(f"{name}: {1000 * len(values) / rate:.1f} ms long; at least {1000 * MIN_SECONDS:.0f} ms")
    # One pass: the sum of finite float32 values in float64 cannot overflow.
    with np.errstate(invalid="ignore"):
        total = values.sum(dtype=np.float64)
    if not np.isfinite(total):
        bad = int((~np.isfinite(values)).sum())
        raise AudioError(f"{name}: {bad} of {values.size} samples are NaN or infinite")
    peak = max(float(values.max()), -float(values.min())) if values.size else 0.0
    if peak > _MAX_PEAK:
        raise AudioError(f"{name}: float samples reach {peak:g}; scale them to [-1, 1]")
    return to_mono(values, name), rate


def to_mono(values: np.ndarray, name: str = "<array>") -> np.ndarray:
    """(samples,) or (samples, channels) -> (samples,). Four cases, the last two refusals.

    Raises:
        AudioError: no channel, more than two channels, or two that cancel out.
    """
    channels = 1 if values.ndim == 1 else values.shape[1]
    # 1. One channel: as it is.
    if channels == 1:
        return values.reshape(-1)
    # 2. Two channels: their average, unless much of them cancels out in it.
    if channels == 2:
        if (share := _cancelled_share(values)) > _MAX_CANCELLED:
            raise AudioError(
                f"{name}: its two channels cancel out: averaged, {share:.0%} of the sound is lost; store one of them, "
                "as `ffmpeg -i IN -af 'pan=mono|c0=c0' OUT.wav` does"
            )
        return (values[:, 0] + values[:, 1]) * np.float32(0.5)
    # 3. No channel at all.
    if channels == 0:
        raise AudioError(f"{name}: it has no channels")
    # 4. More: which of them carry the scene is not ours to guess.
    hint = "; the shape should be (samples, channels)" if channels > len(values) else ""
    raise AudioError(f"{name}: it has {channels} channels, one or two are read; mix it down first{hint}")


def _cancelled_share(values: np.ndarray) -> float:
    """Share of the power of two channels, (samples, 2), in those windows and frequencies where they cancel out."""
    lost = whole = 0.0
    taper = np.hanning(_WINDOW + 1)[:_WINDOW].astype(np.float32)[:, None]
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        block = np.pad(block, ((0, -len(block) % _WINDOW), (0, 0))).reshape(-1, _WINDOW, 2)
        spectra = np.fft.rfft(block * taper, axis=1)
        average = np.square(np.abs(spectra.sum(axis=2) / 2))
        power = np.square(np.abs(spectra)).mean(axis=2)
        lost += float(power[average < _CANCELLED * power].sum())
        whole += float(power.sum())
    return lost / whole if whole else 0.0


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


def _scaled(values: object, name: str) -> np.ndarray:
    """Samples as float32, integer PCM divided by its full scale."""
    array = np.asarray(values)
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: an array is (samples,) or (samples, channels), not {array.shape}")
    if array.size > MAX_SAMPLES:
        raise AudioError(f"{name}: {array.size} values; at most {MAX_SAMPLES}")
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if array.dtype in (np.int8, np.int16, np.int32):
        return array.astype(np.float32) / float(2 ** (8 * array.dtype.itemsize - 1))
    if array.dtype.kind != "f":
        raise AudioError(f"{name}: samples of type {array.dtype}; use float, int16, int32 or uint8")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _read(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Decode a whole file of a known container: float32 (samples, channels) and its rate."""
    if (kind := media_kind(data)) is not None:
        return _read_media(data, kind, name)
    try:
        data, expected = whole_file(data)
    except PartError as error:
        raise AudioError(f"{name}: {error}; {_WHOLE}") from error
    with _opened(data, name) as file:
        if file.format not in FORMATS:
            raise AudioError(f"{name}: {file.format} is not read; use {_USE}")
        if not MIN_RATE <= file.samplerate <= MAX_RATE:
            raise AudioError(f"{name}: {_RATE.format(file.samplerate)}")
        if not 1 <= file.channels <= 2:
            to_mono(np.empty((file.channels + 1, file.channels), dtype=np.float32), name)
        values = _blocks(file, name)
        slack = _MP3_SLACK if "MP3" in file.format or "MPEG" in file.subtype else 0
        expected = expected or (0 if file.format == "MP3" else file.frames)
    if len(values) < expected - slack:
        raise AudioError(f"{name}: truncated, {len(values)} of {expected} samples can be decoded; {_WHOLE}")
    return values, file.samplerate


def _read_media(data: bytes, kind: Media, name: str) -> tuple[np.ndarray, int]:
    """`_read` of what soundfile does not read."""
    try:
        values, rate = decode_media(data, kind, _most_samples)
    except ImportError as error:
        raise AudioError(f"{name}: {explain(data, name)}") from error
    except PartError as error:
        raise AudioError(f"{name}: {kind.what}, {error}; copy the file again, or {conversion(name)}") from error
    return _scaled(values, name), rate


def _most_samples(channels: int, rate: int) -> int:
    """Per channel."""
    return min(MAX_SAMPLES // max(1, channels), MAX_SECONDS * rate)


class _Bytes(io.BytesIO):
    """libsndfile seeks before the start of a damaged file, which is no exception to it."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = (0, self.tell(), self.getbuffer().nbytes)[whence]
        return super().seek(max(0, base + offset))


def _opened(data: bytes, name: str) -> soundfile.SoundFile:
    if is_gsm(data):
        return soundfile.SoundFile(_Bytes(data), format="RAW", subtype="GSM610", samplerate=8_000, channels=1)
    try:
        return soundfile.SoundFile(_Bytes(data))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "error_string", str(error)).rstrip(". ")
        raise AudioError(f"{name}: not readable as audio ({reason}): {explain(data, name)}") from error


def _blocks(file: soundfile.SoundFile, name: str) -> np.ndarray:
    """Everything that can be decoded; in blocks, so that memory is used for what is there, not for what a header says.

    Raises:
        AudioError: over MAX_SECONDS or MAX_SAMPLES by the header, or damaged.
    """
    limit = _most_samples(file.channels, file.samplerate)
    if file.frames > limit:
        raise AudioError(
            f"{name}: {file.frames / file.samplerate:.0f} s when decoded; at most {limit / file.samplerate:.0f} s are "
            "read (MAX_SECONDS, MAX_SAMPLES): cut it into several files"
        )
    values, total = np.empty((file.frames, file.channels), dtype=np.float32), 0
    while space := len(values[total : total + _BLOCK]):
        try:
            block = file.read(dtype="float32", out=values[total : total + space])
        except (RuntimeError, OSError, ValueError) as error:
            raise AudioError(f"{name}: cannot be decoded after {total} samples: {error}; {_WHOLE}") from error
        total += len(block)
        if len(block) < space:
            break
    return values[:total]


def stored_bytes(clip: Clip) -> bytes:
    """The encoded file of a clip that has one.

    Raises:
        AudioError: missing, not a file, over MAX_BYTES, or unreadable.
    """
    if clip.data is not None:
        return clip.data
    path = regular_file(clip)
    if (size := file_status(clip).st_size) > MAX_BYTES:
        raise AudioError(f"{clip.name}: {size} bytes; at most {MAX_BYTES} are read")
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AudioError(f"{clip.name}: cannot be read: {error.strerror}") from error


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
