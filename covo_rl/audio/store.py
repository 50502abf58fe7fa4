"""Two names of a clip, of what is stored and of what is heard, and decoded clips within a memory budget."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock

import numpy as np

from covo_rl.audio.decode import AudioError, decode, decode_stored, file_status, regular_file, stored_bytes
from covo_rl.types import Clip

_CHANGED = (
    "the file has changed since it was first read, and its row was made for what it was; put the old file back, or "
    "start anew with rows for the new one"
)


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

    A file is held to the content that it had when it was first named: its labels belong to that sound.
    """

    def __init__(self, memory_mb: float = 512) -> None:
        if memory_mb < 0:
            raise ValueError(f"memory_mb={memory_mb}: a budget is not negative")
        self.memory_mb = memory_mb
        self.hits = self.decoded = self.evicted = 0
        self._clips: dict[str, Clip] = {}
        self._waveforms: OrderedDict[str, tuple[np.ndarray, int]] = OrderedDict()
        self._files: dict[str, tuple[tuple[int, ...], str]] = {}
        self._lock = Lock()

    def key(self, clip: Clip) -> str:
        """`content_key` of the clip; of a file it is remembered, and compared when its size, time or place changes.

        Raises:
            AudioError: the file is missing, cannot be read, or holds other bytes than when it was first named.
        """
        if clip.path is None:
            key = content_key(clip)
        else:
            version = _version(clip)
            last_version, key = self._files.get(clip.path, (None, ""))
            if last_version != version:
                last_key, key = key, content_key(clip)
                if last_key not in ("", key):
                    raise AudioError(f"{clip.name}: {_CHANGED}")
                self._files[clip.path] = (version, key)
        self._clips.setdefault(key, clip)
        return key

    def named(self, clip: Clip) -> bool:
        """A file's content is one that was named already; that of bytes and arrays cannot change."""
        return clip.path is None or clip.path in self._files

    def watch(self, clips: Iterable[Clip], keys: Mapping[str, str] | None = None) -> dict[str, str]:
        """Name the files of clips that will be used later, so that a change from now on is noticed.

        Returns the key of every path, of all files named so far. With such `keys` of another process no file is read:
        they say what each must hold when it is decoded.
        """
        for clip in clips:
            with contextlib.suppress(AudioError):  # what is missing is said where it is needed
                if clip.path is None or clip.path in self._files:
                    continue
                if keys is None:
                    self.key(clip)
                elif clip.path in keys:
                    self._files[clip.path] = (_version(clip), keys[clip.path])
        return {path: key for path, (_, key) in self._files.items()}

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
        if clip.array is not None:
            entry = decode(clip)
        else:
            data = stored_bytes(clip)
            if clip.path is not None and hashlib.sha256(data).hexdigest() != key:
                raise AudioError(f"{clip.name}: {_CHANGED}")
            entry = decode_stored(data, clip.name)
        with self._lock:
            self.decoded += 1
            if entry[0].nbytes <= self.memory_mb * 2**20:
                self._waveforms.setdefault(key, entry)
            while self.used_mb > self.memory_mb:
                self._waveforms.popitem(last=False)
                self.evicted += 1
        return entry

    def forget(self) -> None:
        """Every clip and what its file held: from now on a file may be another."""
        with self._lock:
            self._clips.clear()
            self._files.clear()
            self._waveforms.clear()

    @property
    def used_mb(self) -> float:
        """Memory of the waveforms held now."""
        return sum(waveform.nbytes for waveform, _ in self._waveforms.values()) / 2**20

    def __len__(self) -> int:
        """Waveforms held now."""
        return len(self._waveforms)


def _version(clip: Clip) -> tuple[int, ...]:
    """Size, times and place of a clip's file; the time of its entry changes where a copy keeps that of its content."""
    status = file_status(clip)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino
