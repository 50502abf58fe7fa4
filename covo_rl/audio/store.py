"""Two names of a clip, of what is stored and of what is heard, and decoded clips within a memory budget."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from threading import Lock

import numpy as np

from covo_rl.audio.decode import AudioError, decode, file_status, regular_file
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
        with open(regular_file(clip), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AudioError(f"{clip.name}: cannot be read: {error.strerror}") from error


def audio_fingerprint(waveform: np.ndarray, rate: int) -> str:
    """sha256 (hex) of a decoded sound, float32 (samples,) at `rate` Hz: its samples as 16-bit integers without digital
    silence at either end, and the rate.

    The same recording has the same fingerprint in every lossless container and bit depth of at least 16, as mono or
    as two equal channels, padded with zeros or not. After lossy coding or resampling the samples differ: see
    `covo_rl.data.overlap` with `near=True`.
    """
    pcm = np.clip(np.rint(waveform * 32_768.0), -32_768, 32_767).astype("<i2")
    audible = np.flatnonzero(pcm)
    sound = pcm[audible[0] : audible[-1] + 1] if len(audible) else pcm
    digest = hashlib.sha256(f"pcm16 {rate} {len(sound)}\n".encode())
    digest.update(sound.data)
    return digest.hexdigest()


class ClipStore:
    """Names clips by content and decodes each once, as long as the decoded waveforms fit into `memory_mb`.

    The least recently used waveform goes first and is decoded again when it is asked for. A clip that alone exceeds
    the budget is decoded but not kept. Safe to use from several threads. Counters: `hits`, `decoded`, `evicted`.
    Clips given as bytes or arrays are themselves held (once per content) on top of the budget.
    """

    def __init__(self, memory_mb: float = 512) -> None:
        if memory_mb < 0:
            raise ValueError(f"memory_mb={memory_mb}: a budget is not negative")
        self.memory_mb = memory_mb
        self.hits = self.decoded = self.evicted = 0
        self._clips: dict[str, Clip] = {}
        self._waveforms: OrderedDict[str, tuple[np.ndarray, int]] = OrderedDict()
        self._files: dict[str, tuple[tuple[int, int], str]] = {}
        self._lock = Lock()

    def key(self, clip: Clip) -> str:
        """`content_key` of the clip; of a file it is remembered until its size or time changes.

        Raises:
            AudioError: the file is missing or cannot be read.
        """
        if clip.path is None:
            key = content_key(clip)
        else:
            version = _version(clip)
            last_version, key = self._files.get(clip.path, (None, ""))
            if last_version != version:
                key = content_key(clip)
                self._files[clip.path] = (version, key)
        self._clips.setdefault(key, clip)
        return key

    def waveform(self, key: str) -> tuple[np.ndarray, int]:
        """(float32 (samples,), rate in Hz) of a clip that `key` has named. Shared: do not write into it.

        Raises:
            KeyError: no clip of this store has that key.
            AudioError: see `decode`; also when the file has changed since it was named.
        """
        with self._lock:
            if key in self._waveforms:
                self.hits += 1
                self._waveforms.move_to_end(key)
                return self._waveforms[key]
            if key not in self._clips:
                raise KeyError(f"no clip with key {key!r}: name it first with ClipStore.key(clip)")
            clip = self._clips[key]
        if clip.path is not None and self._files.get(clip.path) != (_version(clip), key):
            raise AudioError(f"{clip.name}: the file has changed since it was first read")
        entry = decode(clip)
        with self._lock:
            self.decoded += 1
            if entry[0].nbytes <= self.memory_mb * 2**20:
                self._waveforms.setdefault(key, entry)
            while self.used_mb > self.memory_mb:
                self._waveforms.popitem(last=False)
                self.evicted += 1
        return entry

    @property
    def used_mb(self) -> float:
        """Memory of the waveforms held now."""
        return sum(waveform.nbytes for waveform, _ in self._waveforms.values()) / 2**20

    def __len__(self) -> int:
        """Waveforms held now."""
        return len(self._waveforms)


def _version(clip: Clip) -> tuple[int, int]:
    """Size and time of a clip's file."""
    status = file_status(clip)
    return status.st_size, status.st_mtime_ns
