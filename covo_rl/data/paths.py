"""Where the audio of a row is, and that it stays inside the audio folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath

#: Tried after the name itself when a row names a recording without a suffix (AVQA's `video_name`).
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


class AudioFolder:
    """Resolves the audio paths of one data file.

    Where no path exists as it stands but all would without their first folders (`./test-mini-audios/x.wav` with
    --audio-dir .../test-mini-audios), the same number of folders is dropped from every path.
    """

    def __init__(self, root: str | Path, allow_outside: bool = False) -> None:
        self.root, self.allow_outside = Path(root), allow_outside
        self.dropped = 0
        self._real_root = os.path.realpath(self.root)
        self._real_folder = lru_cache(maxsize=4096)(os.path.realpath)

    def fit(self, references: Iterable[str]) -> None:
        """Choose how many leading folders to drop, from all paths of the file."""
        relative = [PurePosixPath(text).parts for text in references if _is_relative(text)]
        for count in range(max(map(len, relative), default=0)):
            shortened = [parts[count:] for parts in relative if len(parts) > count or not count]
            if any(os.path.exists(os.path.join(self.root, *parts)) for parts in shortened):
                self.dropped = count
                return

    def resolve(self, reference: str) -> str:
        """The path of a file.

        Raises:
            ValueError: an empty path, one with NUL or lone surrogates, or one that leaves the folder.
        """
        if not reference.strip():
            raise ValueError("its audio path is empty")
        if "\0" in reference or not encodable(reference):
            raise ValueError(f"its audio path {reference!r} is not a path")
        parts = PurePosixPath(reference).parts
        dropped = self.dropped if _is_relative(reference) and len(parts) > self.dropped else 0
        path = os.path.join(self.root, *parts[dropped:])
        if not self.allow_outside and not self._is_inside(path):
            raise ValueError(
                f"its audio path {reference!r} leaves the audio folder {self.root}; "
                "copy the file there or allow it (--allow-outside-audio, load(..., allow_outside=True))"
            )
        return path

    def named(self, name: str) -> str:
        """The file of a recording that is named without a suffix; `name` with .wav where none exists.

        AVQA writes `ID_000030`, its extracted audio is usually called `ID_30.wav`: both are tried.
        """
        stem, _, number = name.rpartition("_")
        names = [name, f"{stem}_{int(number)}"] if stem and number.isascii() and number.isdigit() else [name]
        paths = [self.resolve(candidate + suffix) for candidate in names for suffix in SUFFIXES]
        return next((path for path in paths if os.path.isfile(path)), paths[0])

    def _is_inside(self, path: str) -> bool:
        # Real paths, so that neither `..` nor a link that came with the data leads out.
        folder, name = os.path.split(path)
        real = os.path.join(self._real_folder(folder), name)
        if name in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(path)
        return os.path.commonpath([self._real_root, real]) == self._real_root


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: lone surrogates, which JSON can spell, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_relative(reference: str) -> bool:
    path = PurePosixPath(reference)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in reference and encodable(reference)
