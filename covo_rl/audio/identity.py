"""Two names of a clip: of what is stored, and of what is heard."""

from __future__ import annotations

import hashlib

import numpy as np

from covo_rl.audio.decode import AudioError, _existing, decode
from covo_rl.types import Clip


def content_key(clip: Clip) -> str:
    """sha256 (hex) of the stored bytes; of an array, of its samples, shape, type and rate. Decodes nothing.

    Equal keys mean equal sound. The same sound in another container has another key: see `audio_fingerprint`.

    Raises:
        AudioError: the file is missing or cannot be read.
    """
    if clip.array is not None:
        array = np.ascontiguousarray(clip.array)
        digest = hashlib.sha256(f"array {array.dtype.str} {array.shape} {clip.sampling_rate}\n".encode())
        digest.update(array.data if array.size else b"")
        return digest.hexdigest()
    if clip.data is not None:
        return hashlib.sha256(clip.data).hexdigest()
    try:
        with open(_existing(clip), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AudioError(f"{clip.name}: cannot be read: {error.strerror}") from error


def audio_fingerprint(clip: Clip) -> str:
    """sha256 (hex) of the decoded sound: mono samples as 16-bit integers without digital silence at either end, and
    the rate.

    The same recording has the same fingerprint in every lossless container and bit depth of at least 16, as mono or
    as two equal channels, padded with zeros or not. After lossy coding or resampling the samples differ: see
    `covo_rl.data.overlap` with `near=True`.

    Raises:
        AudioError: see `decode`.
    """
    return fingerprint_of(*decode(clip))


def fingerprint_of(waveform: np.ndarray, rate: int) -> str:
    """`audio_fingerprint` of a waveform, float32 (samples,), at `rate` Hz."""
    pcm = np.clip(np.rint(waveform * 32_768.0), -32_768, 32_767).astype("<i2")
    heard = np.flatnonzero(pcm)
    sound = pcm[heard[0] : heard[-1] + 1] if len(heard) else pcm
    digest = hashlib.sha256(f"pcm16 {rate} {len(sound)}\n".encode())
    digest.update(sound.data)
    return digest.hexdigest()
