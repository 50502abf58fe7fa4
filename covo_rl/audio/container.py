"""Is the end of a file missing? libsndfile reads a cut wav, aiff or ogg without a word, so the container is asked.

Formats: RIFF/RF64 (EBU Tech 3306) and AIFF are lists of sized chunks; every Ogg page (RFC 3533) starts with `OggS` and
the last page of a stream carries the end-of-stream flag.
"""

from __future__ import annotations

import os
from typing import BinaryIO, Literal

#: Writers that cannot seek back leave these instead of a size.
_UNKNOWN_SIZES = (0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x7FFFFFFE)
_MAX_CHUNKS = 10_000
#: Some writers count their own header as samples.
_HEADER_BYTES = 64
_OGG_PAGE = 27 + 255 + 255 * 255
#: An mp3 counts frames of 1,152 samples, the header frame and the decoder's delay perhaps among them.
_MP3_SLACK = 2 * 1_152


def missing_end(stream: BinaryIO, container: str, decoded: int, expected: int) -> str:
    """What says that the end is missing, or an empty string.

    `container` is soundfile's name of the format, `expected` the samples that its header promises.
    """
    stream.seek(0)
    magic = stream.read(4)
    if container in ("WAV", "WAVEX", "RF64"):
        return _short_chunk(stream, b"data", "big" if magic == b"RIFX" else "little")
    if container == "AIFF":
        return _short_chunk(stream, b"SSND", "big")
    if container == "OGG":
        return _cut_page(stream)
    if (container == "FLAC" and decoded < expected) or (
        container == "MP3" and decoded < expected - _MP3_SLACK and _states_length(stream)
    ):
        return f"{decoded} of {expected} samples can be decoded"
    return ""


def _short_chunk(stream: BinaryIO, name: bytes, order: Literal["big", "little"]) -> str:
    """Walk the chunks up to the one that holds the samples and compare its size with what follows."""
    size = stream.seek(0, os.SEEK_END)
    place, long_size = 12, 0
    for _ in range(_MAX_CHUNKS):
        if place + 8 > size:
            break
        stream.seek(place)
        header = stream.read(8)
        length = int.from_bytes(header[4:], order)
        if header[:4] == b"ds64":
            long_size = int.from_bytes(stream.read(16)[8:], "little")
        if header[:4] == name:
            length = long_size if length in _UNKNOWN_SIZES else length
            there = size - place - 8
            short = length > there + _HEADER_BYTES
            return f"its header promises {length} bytes of samples, {there} follow" if short else ""
        place += 8 + length + length % 2
    return ""


def _cut_page(stream: BinaryIO) -> str:
    """Whether the last page is whole and says that it is the last."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _OGG_PAGE - 27))
    tail = stream.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    table = page[27 : 27 + page[26]] if len(page) >= 27 else b""
    if not page.startswith(b"OggS") or len(page) < 27 or len(page) < 27 + page[26] + sum(table):
        return "its last Ogg page is cut"
    return "" if page[5] & 0x04 else "its last Ogg page does not end the stream"


def _states_length(stream: BinaryIO) -> bool:
    """Whether the first mp3 frame is a Xing or Info header; without it the length is estimated from the size."""
    stream.seek(0)
    head = stream.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    stream.seek(start)
    frame = stream.read(2_048)
    return b"Xing" in frame or b"Info" in frame
