"""The sounds of a report: which file a clip was, how it gets into the page or is linked from it.

A rollouts file names each clip by path and by the sha256 of what the run heard, and nothing else is embedded or linked:
a file that is missing or holds other bytes is said to be so. Sounds of rows in memory lie in RUN/clips, named by their
content (records/sounds.py). Runs of older versions recorded no sha256: their clips are linked, and embedded only from
the built-in set, which this package renders.

Embedded is an mp3, 16 kHz and mono: every browser plays it (Safari learnt Ogg late), and it has a tenth of the bytes of
a wav. It is there to be listened to; models hear the file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile

from covo_rl.audio import AudioError, resample
from covo_rl.audio.decode import decode_stored, stored_bytes
from covo_rl.records.sounds import ARRAY, SOUNDS
from covo_rl.resolve import cache_folder
from covo_rl.run.report.pictures import mel_picture, peaks
from covo_rl.run.report.values import Notes, Progress, readable
from covo_rl.types import Clip

#: Hz of sounds in the page, and of those that a decoder of audio codes makes
RATE, MADE_RATE = 16_000, 24_000
#: bytes of a file that is embedded, and of all files that are read only to check a link
_MAX_FILE, _MAX_CHECKED = 100_000_000, 1_000_000_000
#: clips, and bytes of their files, that are made ready together; a larger file alone, for what it holds is larger still
_TOGETHER, _MAX_TOGETHER = 64, 20_000_000
#: bytes of the page for one byte: base64 in JSON, of which packing undoes most, and base64 of all
_SPREAD = 1.37
#: estimates of a clip's bytes: of a second of mp3, and of its pictures
_SECOND, _PICTURES = 3_000, 5_000
#: names of clips without a file (types.Clip)
_IN_MEMORY = ("<bytes>", "<array>")
_KEY = re.compile("[0-9a-f]{64}")
_OLD = "linked, not embedded: this run is of a version that did not record what the file held"


class Sounds:
    """The clips of runs as entries of `clips`, by content where that is known.

    Args:
        page: the folder in which the page will lie.
    """

    def __init__(self, page: str | Path, notes: Notes) -> None:
        self.page, self.notes = os.path.abspath(page), notes
        self.entries: dict[str, dict[str, Any]] = {}
        self._paths: dict[str, Path] = {}
        self._copies: dict[Path, dict[str, Path]] = {}

    def add(self, name: str, key: str, run: Path) -> str:
        """Its key in `clips`. The file is looked for, and not yet read."""
        key = key if _KEY.fullmatch(key) else ""
        entry = key or f"unchecked {readable(name)}"
        if entry not in self._paths:
            path, note = self._copy(run, key) or Path(os.path.abspath(name)), None if key else _OLD
            if name in _IN_MEMORY and path.name == name:
                note = "it was a sound in memory, of which the run kept no copy"
            elif not _is_file(path):
                note = f"its file is missing: {readable(path)}"
            else:
                self._paths[entry] = path
            href = relative_url(path, self.page) if entry in self._paths else None
            name = "a sound in memory" if name in _IN_MEMORY else readable(os.path.basename(name))
            made = dict.fromkeys(("seconds", "src", "peaks", "mel"))  # by `embed`
            self.entries[entry] = {"name": name, "href": href, "note": note, **made}
        return entry

    def _copy(self, run: Path, key: str) -> Path | None:
        """The copy of a sound in memory that the run kept; a link in its place is not followed out of the run."""
        if run not in self._copies:
            self._copies[run] = {path.name.partition(".")[0]: path for path in (run / SOUNDS).glob("[0-9a-f]*.*")}
        path = self._copies[run].get(key)
        return Path(os.path.abspath(path)) if path and _is_inside(path, run) else None

    def embed(self, entries: Sequence[str], room: float, progress: Progress) -> None:
        """Put clips into the page, in this order, each that fits into what is left of `room` bytes.

        Encoding is nearly all of a report's time and needs no lock of Python's: threads do it, some clips ahead.
        """
        number = 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for batch in self._batches(entries):
                if room <= _SPREAD * _PICTURES:
                    break
                progress("sounds", number, len(entries))
                number += len(batch)
                for entry, (taken, parts) in zip(batch, pool.map(partial(self._parts, room=room), batch), strict=True):
                    if parts and max(taken, self._estimate(entry)) <= room:
                        room -= taken
                        self.entries[entry] |= parts
        if number:
            progress("sounds", len(entries), len(entries))

    def _batches(self, entries: Sequence[str]) -> Iterator[list[str]]:
        batch, size = [], 0
        for entry in entries:
            more = self._size(entry)
            if more is None or more > _MAX_FILE:
                continue
            if len(batch) == _TOGETHER or (batch and size + more > _MAX_TOGETHER):
                yield batch
                batch, size = [], 0
            batch.append(entry)
            size += more
        if batch:
            yield batch

    def _size(self, entry: str) -> int | None:
        """Bytes of a file that may be embedded."""
        path = self._paths.get(entry)
        if path is None or not (_KEY.fullmatch(entry) or _is_inside(path, cache_folder())):
            return None
        try:
            return path.stat().st_size
        except OSError as error:
            self._drop(entry, str(error))
            return None

    def _estimate(self, entry: str) -> float:
        """Bytes of the page that a clip of known length takes at most, mostly."""
        return _SPREAD * (_SECOND * self.entries[entry]["seconds"] + _PICTURES)

    def _parts(self, entry: str, room: float) -> tuple[float, dict[str, Any]]:
        """(bytes of the page, what the entry has when embedded); nothing where it takes over `room`, or is no sound."""
        clip = self.entries[entry]
        try:
            waveform, rate = decode_stored(self._content(entry), clip["name"])
        except (AudioError, OSError) as error:
            self._drop(entry, str(error))
            return 0, {}
        clip["seconds"] = round(len(waveform) / rate, 3)
        if self._estimate(entry) > room:
            return 0, {}
        return _page_sound(waveform, rate)

    def add_wave(self, entry: str, name: str, wave_T: np.ndarray, room: float) -> float:
        """A sound that was made for the page: float32 (T,) at 24 kHz; bytes of the page that it takes, 0 where that is
        over `room` and it is left out."""
        taken, parts = _page_sound(wave_T, MADE_RATE)
        if taken > room:
            return 0.0
        self.entries[entry] = {"name": name, "seconds": round(len(wave_T) / MADE_RATE, 3), **parts}
        return taken

    def add_missing(self, entry: str, name: str, why: str) -> None:
        """One that could not be made."""
        nothing = dict.fromkeys(("href", "seconds", "src", "peaks", "mel"))
        self.entries[entry] = {"name": name, "note": readable(why), **nothing}

    def check_links(self) -> None:
        """Hold the files that are linked to what the run heard, as long as they are no gigabyte together."""
        total = 0
        for entry, path in list(self._paths.items()):
            if self.entries[entry]["src"] is None and _KEY.fullmatch(entry) and _is_file(path):
                total += path.stat().st_size
                if total > _MAX_CHECKED:
                    self.notes.count("linked sounds were not compared with what the run heard: too many bytes")
                    continue
                try:
                    self._content(entry)
                except (AudioError, OSError) as error:
                    self._drop(entry, str(error))

    def _content(self, entry: str) -> bytes:
        """The bytes of the file. Raises AudioError where they are not those that the run heard."""
        path = self._paths[entry]
        content = stored_bytes(Clip(path=str(path)))
        exact = _KEY.fullmatch(entry) and not path.name.endswith(ARRAY)  # of an array the key is of its samples
        if exact and hashlib.sha256(content).hexdigest() != entry:
            raise AudioError(f"{path}: the file is another than the run heard")
        return content

    def _drop(self, entry: str, why: str) -> None:
        self.entries[entry] |= {"href": None, "note": readable(why)}
        del self._paths[entry]


def _page_sound(waveform: np.ndarray, rate: int) -> tuple[float, dict[str, Any]]:
    """(bytes of the page, what an embedded clip has) of mono float32 samples."""
    sound = resample(waveform, rate, RATE)
    content, kind = _encoded(sound)
    picture = mel_picture(sound, RATE)
    taken = _SPREAD * (len(content) + len(picture["png"])) + 1_000
    picture["png"] = data_url(picture["png"], "image/png")
    return taken, {"src": data_url(content, kind), "href": None, "peaks": peaks(waveform), "note": None, "mel": picture}


def relative_url(path: Path, folder: str) -> str:
    """A URL of the file for a page in the folder; absolute where no relative one can be, on another drive."""
    try:
        return quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
    except ValueError:
        return path.absolute().as_uri()


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _encoded(sound: np.ndarray) -> tuple[bytes, str]:
    """(encoded file, its media type) of float32 (samples,) at RATE; a wav where this libsndfile writes no mp3."""
    has_mp3, stream = "MP3" in soundfile.available_formats(), io.BytesIO()
    form: dict[str, Any] = {"format": "MP3", "compression_level": 0.8} if has_mp3 else {"format": "WAV"}
    with soundfile.SoundFile(stream, "w", samplerate=RATE, channels=1, **form) as file:
        file.write(np.clip(sound, -1.0, 1.0))
    return stream.getvalue(), "audio/mpeg" if has_mp3 else "audio/wav"
