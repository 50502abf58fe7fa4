"""Decoded clips by content, within a memory budget."""

from __future__ import annotations

import os
from collections import OrderedDict
from threading import Lock

import numpy as np

from covo_rl.audio.decode import AudioError, decode
from covo_rl.audio.identity import content_key
from covo_rl.types import Clip


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
        self._budget = int(memory_mb * 2**20)
        self._used = 0
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
            state = _state(clip.path)
            known = self._files.get(clip.path)
            key = known[1] if known and known[0] == state else content_key(clip)
            self._files[clip.path] = (state, key)
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
        if clip.path is not None and self._changed(clip.path, key):
            raise AudioError(f"{clip.name}: the file has changed since it was first read")
        entry = decode(clip)
        with self._lock:
            self.decoded += 1
            self._keep(key, entry)
        return entry

    @property
    def used_mb(self) -> float:
        """Memory of the waveforms held now."""
        return self._used / 2**20

    def __len__(self) -> int:
        """Waveforms held now."""
        return len(self._waveforms)

    def _changed(self, path: str, key: str) -> bool:
        known = self._files.get(path)
        return known is None or known[1] != key or known[0] != _state(path)

    def _keep(self, key: str, entry: tuple[np.ndarray, int]) -> None:
        if entry[0].nbytes > self._budget or key in self._waveforms:
            return
        self._waveforms[key] = entry
        self._used += entry[0].nbytes
        while self._used > self._budget:
            _, (old, _) = self._waveforms.popitem(last=False)
            self._used -= old.nbytes
            self.evicted += 1


def _state(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AudioError(f"{path}: cannot be opened: {reason}") from error
    return found.st_size, found.st_mtime_ns
