"""What checking needs to know of a clip: its length, what it sounds like, or why it cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from covo_rl.audio import AudioError, decode
from covo_rl.audio.identity import fingerprint_of
from covo_rl.types import Clip

#: Decoding, hashing and numpy release the interpreter lock; more threads than this only hold more clips in memory.
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Facts:
    """Of a decoded clip. `error` is None for a good one; then `seconds` and `fingerprint` hold."""

    seconds: float = 0.0
    fingerprint: str = ""
    error: str | None = None


def clip_facts(clips: Iterable[Clip]) -> list[Facts]:
    """Facts of every clip, in order, each file decoded once per process as long as it does not change."""
    clips = list(clips)
    if len(clips) < 2 * _THREADS:
        return [_facts(clip) for clip in clips]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_facts, clips))


def _facts(clip: Clip) -> Facts:
    if clip.path is None:
        return _measure(clip)
    try:
        found = os.stat(clip.path)
    except (OSError, ValueError):
        return _measure(clip)
    return _of_file(clip.path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1_000_000)
def _of_file(path: str, size: int, mtime_ns: int) -> Facts:
    return _measure(Clip(path=path))


def _measure(clip: Clip) -> Facts:
    try:
        waveform, rate = decode(clip)
    except AudioError as error:
        return Facts(error=str(error))
    return Facts(len(waveform) / rate, fingerprint_of(waveform, rate))
