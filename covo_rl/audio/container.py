"""Is the end of a file missing? libsndfile reads a cut wav, aiff or ogg without a word, so the container is asked.

Formats: RIFF/RF64 (EBU Tech 3306) and AIFF are lists of sized chunks; every Ogg page (RFC 3533) starts with `OggS` and
the last page of a stream carries the end-of-stream flag.
"""

from __future__ import annotations

import os
from typing import BinaryIO

#: Writers that cannot seek back leave these instead of a size.
_UNKNOWN_SIZES = (0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x7FFFFFFE)
_MAX_CHUNKS = 10_000
#: Some writers count their own header as samples.
_HEADER_BYTES = 64
_OGG_PAGE = 27 + 255 + 255 * 255


def missing_bytes(stream: BinaryIO, container: str) -> str:
    """What says that the end is missing, or an empty string. `container` is soundfile's name of the format."""
    size = stream.seek(0, os.SEEK_END)
    if container in ("WAV", "WAVEX", "RF64"):
        return _chunks(stream, size, b"data", "big" if _magic(stream) == b"RIFX" else "little")
    if container == "AIFF":
        return _chunks(stream, size, b"SSND", "big")
    if container == "OGG":
        return _pages(stream, size)
    return ""


def _magic(stream: BinaryIO) -> bytes:
    stream.seek(0)
    return stream.read(4)


def _chunks(stream: BinaryIO, size: int, wanted: bytes, order: str) -> str:
    """Walk the chunks up to the one that holds the samples and compare its size with what follows."""
    place, long_size = 12, None
    for _ in range(_MAX_CHUNKS):
        if place + 8 > size:
            return ""
        stream.seek(place)
        header = stream.read(8)
        length = int.from_bytes(header[4:], "big" if order == "big" else "little")
        if header[:4] == b"ds64":
            long_size = int.from_bytes(stream.read(16)[8:], "little")
        if header[:4] == wanted:
            if length in _UNKNOWN_SIZES:
                length = long_size or 0
            there = size - place - 8
            short = length > there + _HEADER_BYTES
            return f"its header promises {length} bytes of samples, {there} follow" if short else ""
        place += 8 + length + length % 2
    return ""


def _pages(stream: BinaryIO, size: int) -> str:
    """Whether the last page is whole and says that it is the last."""
    stream.seek(max(0, size - _OGG_PAGE - 27))
    tail = stream.read()
    start = tail.rfind(b"OggS")
    if start < 0 or len(tail) - start < 27:
        return "its last Ogg page is cut"
    page = tail[start:]
    table = page[27 : 27 + page[26]]
    if len(table) < page[26] or len(page) < 27 + page[26] + sum(table):
        return "its last Ogg page is cut"
    return "" if page[5] & 0x04 else "its last Ogg page does not end the stream"
