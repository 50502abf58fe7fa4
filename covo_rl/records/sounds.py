"""Sounds of rows in memory, kept in the run folder: what has no file cannot be listened to afterwards.

RUN/clips/KEY.wav (.flac, ...)   encoded bytes as they were; KEY is their sha256
RUN/clips/KEY.array.flac         an array, as 16 bits; KEY is its `content_key`
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from covo_rl.audio import decode
from covo_rl.types import Clip, Example

SOUNDS, ARRAY = "clips", ".array.flac"
#: bytes that a run keeps
LIMIT = 256_000_000
_SUFFIXES = {b"RIFF": ".wav", b"RF64": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"FORM": ".aiff", b"ID3": ".mp3",
             b"\xff": ".mp3"}  # fmt: skip


class SoundFolder:
    """RUN/clips while a run goes on: files named by what they hold, until there are `limit` bytes."""

    def __init__(self, run: Path, limit: int) -> None:
        self.folder = run / SOUNDS
        kept = [*self.folder.glob("[0-9a-f]*")]
        self._seen = {path.name.partition(".")[0] for path in kept}
        self._room = limit - sum(path.stat().st_size for path in kept)

    def __contains__(self, key: str) -> bool:
        return key in self._seen

    def put(self, key: str, suffix: str, content: bytes) -> bool:
        """Write a file as a whole; False where there is no room for it.

        Raises:
            OSError: the disk is full.
        """
        if len(content) > self._room:
            return False
        self._room -= len(content)
        self._seen.add(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".partial-{key}"
        partial.write_bytes(content)
        os.replace(partial, self.folder / f"{key}{suffix}")
        return True


class KeptSounds:
    """Keeps each sound of rollouts that has no file, once, until there are LIMIT bytes."""

    def __init__(self, run: Path, examples: Iterable[Example]) -> None:
        self.folder = SoundFolder(run, LIMIT)
        self.rows = {row.id: row.clips for row in examples if any(clip.path is None for clip in row.clips)}
        self._refused: set[str] = set()

    def keep(self, rollouts: Sequence[Mapping[str, Any]]) -> int:
        """Write the new sounds of these rows of a rollouts file; how many there was no room for.

        Raises:
            OSError: the disk is full.
        """
        before = len(self._refused)
        for row in rollouts if self.rows else ():
            for clip, key in zip(self.rows.get(row["id"], ()), row["clip_keys"], strict=False):
                if clip.path is None and key not in self.folder and key not in self._refused:
                    content, suffix = _stored(clip)
                    if not self.folder.put(key, suffix, content):
                        self._refused.add(key)
        return len(self._refused) - before


def _stored(clip: Clip) -> tuple[bytes, str]:
    if clip.data is not None:
        return clip.data, next((end for start, end in _SUFFIXES.items() if clip.data.startswith(start)), ".audio")
    waveform, rate = decode(clip)
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(waveform, -1.0, 1.0), rate, format="FLAC", subtype="PCM_16")
    return stream.getvalue(), ARRAY
