"""From the audio paths of a data file to files, all in one folder."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from covo_rl.data.read import is_url, printable

#: JSON can spell them, UTF-8 cannot.
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
#: Tried after the name itself when a row names a recording without a suffix (AVQA's `video_name`).
_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


class AudioFolder:
    """Resolves the audio paths of one data file, which has these `references`.

    Where no path exists as it stands but some would without their first folders (`./test-mini-audios/x.wav` with
    --audio-dir .../test-mini-audios), those are dropped: from the paths that start with the audio folder's own name;
    where none does, from all, unless two of them would then name one file or the files lie beside the audio folder.
    `hint` says what to do about paths that do not exist. With `absolute`, absolute paths may lie anywhere.
    """

    def __init__(self, root: Path, allow_outside: bool, references: Iterable[str], *, absolute: bool = False) -> None:
        self.root, self.allow_outside, self.absolute, self.hint = root, allow_outside, absolute, ""
        self._dropped: Container[tuple[str, ...]] = ()
        self._count = 0
        self._real_root = os.path.realpath(root)
        self._real_folder = lru_cache(maxsize=4096)(os.path.realpath)
        relative = {PurePosixPath(text).parts for text in references if _is_relative(text)}
        for count in range(max(map(len, relative), default=0)):
            long_enough = [parts for parts in relative if len(parts) > count]
            if any(os.path.exists(os.path.join(root, *parts[count:])) for parts in long_enough):
                self._count = count
                self._dropped = self._droppable(long_enough, count) if count else ()
                break

    def _droppable(self, relative: Sequence[tuple[str, ...]], count: int) -> Container[tuple[str, ...]]:
        """The first folders, `count` of them, that paths may lose."""
        prefixes = {parts[:count] for parts in relative}
        for folder in (os.path.abspath(self.root), self._real_root):
            if (own := PurePosixPath(folder).parts[-count:]) in prefixes:
                self.hint = f"its first folders are not those of the audio folder {self.root}; check --audio-dir"
                return {own}
        for level in range(1, count + 1):
            above = os.path.normpath(os.path.join(self._real_root, *[".."] * level))
            if any(os.path.exists(os.path.join(above, *parts)) for parts in relative):
                self.hint = f"it exists from {above}: use that as --audio-dir"
                return ()
        shortened: dict[tuple[str, ...], tuple[str, ...]] = {}
        for parts in relative:
            other = shortened.setdefault(parts[count:], parts)
            if other != parts:
                one, two = sorted("/".join(path) for path in (parts, other))
                self.hint = f"without their first folders {one} and {two} would be one file; check --audio-dir"
                return ()
        return prefixes

    def resolve(self, reference: str) -> str:
        """The path of a file.

        Raises:
            ValueError: an empty path, a URL, one with NUL or lone surrogates, or one that leaves the folder.
        """
        if not reference.strip():
            raise ValueError("its audio path is empty")
        if is_url(reference):
            what = f"its audio {printable(reference)} is a URL, from which nothing is fetched"
            raise ValueError(f"{what}; download it and write the path of the file")
        if "\0" in reference or LONE_SURROGATE.search(reference):
            raise ValueError(f"its audio path {reference!r} is not a path")
        parts = PurePosixPath(reference).parts
        drops = self._count and _is_relative(reference) and parts[: self._count] in self._dropped
        path = os.path.join(self.root, *parts[self._count if drops and len(parts) > self._count else 0 :])
        is_free = self.allow_outside or (self.absolute and PurePosixPath(reference).is_absolute())
        if not is_free and not self._is_inside(path):
            hint = "copy the file there or allow it (--allow-outside-audio, load_examples(..., allow_outside=True))"
            raise ValueError(f"its audio path {reference!r} leaves the audio folder {self.root}; {hint}")
        return path

    def named(self, name: str) -> str:
        """The file of a recording that is named without a suffix; `name` with .wav where none exists.

        AVQA writes `ID_000030`, its extracted audio is usually called `ID_30.wav`: both are tried.
        """
        stem, _, number = name.rpartition("_")
        names = [name, f"{stem}_{int(number)}"] if stem and number.isascii() and number.isdigit() else [name]
        paths = [self.resolve(candidate + suffix) for candidate in names for suffix in _SUFFIXES]
        present = [path for path in paths if os.path.isfile(path)]
        if present[1:]:
            raise ValueError(f"its audio {name!r} may be {' or '.join(present)}; write the name with its suffix")
        return present[0] if present else paths[0]

    def _is_inside(self, path: str) -> bool:
        # Real paths, so that neither `..` nor a link that came with the data leads out.
        folder, name = os.path.split(path)
        real = os.path.join(self._real_folder(folder), name)
        if name in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(path)
        return os.path.commonpath([self._real_root, real]) == self._real_root


def _is_relative(reference: str) -> bool:
    path, is_text = PurePosixPath(reference), "\0" not in reference and not LONE_SURROGATE.search(reference)
    return is_text and not is_url(reference) and not path.is_absolute() and ".." not in path.parts
