"""Ogg pages (RFC 3533) and mp3 frames, walked from the first to the last: is the stream whole, and is it one?"""

from __future__ import annotations

import math
import zlib
from itertools import pairwise
from typing import NamedTuple


class PartError(ValueError):
    """Only a part of a file would be read. The message is what is wrong with it, without its name."""


# -- Ogg -------------------------------------------------------------------------------------------------------------

_CODECS = {b"\x01vorbis": "Vorbis", b"OpusHea": "Opus", b"\x7fFLAC\x01\x00": "FLAC", b"\x80theora": "Theora video"}
#: libogg ends a page at so many bytes, others (Opus, ffmpeg) at one second.
_FULL_PAGE, _SECOND = 4_096, (0.95, 1.06)
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class _Page(NamedTuple):
    flags: int
    granule: int
    serial: int
    number: int
    table: bytes
    body: bytes


def whole_ogg(data: bytes) -> bytes:
    """An Ogg file that can be read whole: with the end-of-stream flag that some encoders leave out, without which Opus
    is not decoded; of FLAC the stream itself, as libsndfile does not read that of every encoder.

    An encoder that does not set the flag leaves a last page that is not full; a cut file ends in a page that is cut,
    or in a full one.

    Raises:
        PartError: it is cut or damaged, or holds several streams.
    """
    pages, place = [], 0
    while data[place : place + 4] == b"OggS":
        page, size = _page(data, place)
        if page is None:
            raise PartError(f"truncated, its last Ogg page is cut at byte {place}")
        if size < 0:
            raise PartError(f"damaged, the Ogg page at byte {place} has another checksum")
        pages.append(page)
        place += size
    if data.find(b"OggS", place) >= 0 or (place < len(data) and not pages[-1].flags & 4):
        raise PartError(f"damaged or truncated, no Ogg page starts at byte {place}")
    serials = {page.serial for page in pages}
    if len(serials) > 1 or any(page.flags & 2 for page in pages[1:]):
        kinds = [_CODECS.get(page.body[:7], "another") for page in pages if page.flags & 2]
        what = f"{len(kinds)} streams ({', '.join(kinds)}), chained or side by side; one would be read"
        raise PartError(f"it holds {what}")
    if any(b.number != (a.number + 1) & 0xFFFFFFFF for a, b in pairwise(pages)):
        raise PartError("damaged, a page of its Ogg stream is missing")
    is_ended, last = pages[-1].flags & 4, place - size
    if not is_ended and _is_full(pages):
        raise PartError("truncated, its last Ogg page does not end the stream")
    if pages[0].body.startswith(b"\x7fFLAC"):
        return b"".join(page.body for page in pages)[9:]
    if is_ended:
        return data
    ended = bytearray(data[last:place])
    ended[5] |= 4
    ended[22:26] = _checksum(ended).to_bytes(4, "little")
    return data[:last] + bytes(ended) + data[place:]


def _page(data: bytes, place: int) -> tuple[_Page | None, int]:
    """The page at `place` and its size in bytes: no page where it is cut, a negative size where it is damaged."""
    head = data[place : place + 27]
    table = data[place + 27 : place + 27 + head[26]] if len(head) == 27 else b""
    size = 27 + len(table) + sum(table)
    if len(head) < 27 or len(table) < head[26] or place + size > len(data):
        return None, 0
    body = data[place + size - sum(table) : place + size]
    granule = int.from_bytes(head[6:14], "little", signed=True)
    serial, number, checksum = (int.from_bytes(head[a : a + 4], "little") for a in (14, 18, 22))
    page = _Page(head[5], granule, serial, number, table, body)
    return page, size if _checksum(data[place : place + size]) == checksum else -size


def _checksum(page: bytes | bytearray) -> int:
    """Ogg's checksum is zlib's with the bits of every byte in the other order, started and ended at 0."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    return int(f"{zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def _is_full(pages: list[_Page]) -> bool:
    """Whether the last page looks like any other one of the stream, so that more must have followed."""
    first, last = pages[0].body, pages[-1]
    rate = 48_000 if first.startswith(b"OpusHead") else int.from_bytes(first[12:16], "little") or 1
    granules = [page.granule for page in pages if page.granule > 0]
    bodies = [len(page.body) for page in pages if page.granule > 0]
    if not granules or last.granule < 0 or last.table[-1:] in (b"", b"\xff"):  # no samples, or a packet goes on
        return True
    if len(last.body) >= _FULL_PAGE or len(last.table) == 255:
        return True
    *steps, step = (b - a for a, b in pairwise([0, *granules]))
    timed = not steps or min(bodies[:-1]) < _FULL_PAGE
    return timed and (_SECOND[0] <= step / rate <= _SECOND[1] or step >= 0.95 * max(steps, default=math.inf))


# -- mp3 -------------------------------------------------------------------------------------------------------------

_KBIT = {
    (1, 1): [32 * n for n in range(15)],
    (1, 2): [0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384],
    (1, 3): [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320],
    (2, 1): [0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256],
    (2, 2): [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160],
}


_MAX_FRAME = 1_441


class _Frame(NamedTuple):
    """`kind` is (version, layer, rate in Hz, whether it is mono): it stays the same through a stream."""

    size: int
    samples: int
    kind: tuple[int, int, int, bool]

    @property
    def layer(self) -> int:
        return self.kind[1]


def after_tags(data: bytes, place: int) -> int:
    """The position behind the ID3v2 and APE tags at `place`, and the zeros that pad them."""
    start = place
    while tag := data[place : place + 32]:
        if tag[:3] == b"ID3" and len(tag) >= 10:
            size = sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:10], (21, 14, 7, 0), strict=True))
            place += 10 + size + (10 if tag[5] & 0x10 else 0)
        elif tag[:8] == b"APETAGEX" and len(tag) == 32:
            place += 32 + (int.from_bytes(tag[12:16], "little") if tag[23] & 0x20 else 0)  # a header, not a footer
        else:
            break
    padding = len(data) - place - len(data[place:].lstrip(b"\0")) if place > start else 0
    return place + max(0, padding)


def whole_mp3(data: bytes) -> tuple[bytes, int]:
    """(The frames of an mp3 without its tags, their samples per channel less the delay and padding that an encoder
    states); data that starts otherwise, behind tags, as it is, with 0.

    One without a header that states its length gets one: libsndfile guesses it from the first frames, and of a
    variable bit rate reads what it guessed.

    Raises:
        PartError: a frame is cut or damaged, the rate or the number of channels changes, or another recording follows.
    """
    tags = after_tags(data, 0)
    start = _next_frame(data, tags) if tags else 0
    first = _frame(data, start)
    if first is None or (first.layer != 3 and _next_frame(data, start) != start):
        is_sync = data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] >= b"\xe0"
        if is_sync and _next_frame(data, start) < len(data):
            raise PartError(f"damaged, its first mp3 frame at byte {start} is none")
        return data, 0  # also free format, of which only the decoder knows
    for place in range(max(0, start - _MAX_FRAME), tags):
        before = _frame(data, place)
        if before and before.kind == first.kind and place + before.size == start:
            raise PartError("damaged, its ID3 tag claims to be longer than it is: some sound would not be read")
    header, (samples, end) = data[start : start + first.size], _mp3_frames(data, start, first)
    if first.layer != 3 or _length_header(header, first)[0] is not None:
        return data[start:end], samples
    head = bytearray(data[start : start + 4])
    head[1] |= 1  # no checksum follows
    head[2] = head[2] & 0x0C | 0xE0  # the highest bit rate, so that there is room
    frame = _frame(bytes(head), 0)
    assert frame is not None
    text = bytes(_side_info(first) - 4) + b"Xing" + (1).to_bytes(4, "big")
    text += (samples // first.samples).to_bytes(4, "big")
    return bytes(head) + text + bytes(frame.size - 4 - len(text)) + data[start:end], samples


def _mp3_frames(data: bytes, start: int, first: _Frame) -> tuple[int, int]:
    """(Samples of the frames from `start` on, end of the last one), see `whole_mp3`."""
    header = data[start : start + first.size]
    stated, spare = _length_header(header, first)
    place = start + (first.size if stated is not None else 0)
    count, last_end = 0, place
    while place < len(data):
        frame = _frame(data, place)
        if data[place : place + 3] == b"TAG" or (tags := after_tags(data, place)) > place:
            place = place + 128 if data[place : place + 3] == b"TAG" else tags
        elif frame is not None and frame.kind == first.kind:
            if place + frame.size > len(data):
                raise PartError(f"truncated, its last mp3 frame is cut at byte {place}")
            if count and _length_header(data[place : place + frame.size], frame)[0] is not None:
                raise PartError(f"another recording starts at byte {place}, which would not be read")
            count, place = count + 1, place + frame.size
            last_end = place
        elif (following := _next_frame(data, place)) < len(data):
            changed = _frame(data, following)
            what = "damaged" if changed and changed.kind == first.kind else "its rate or number of channels changes"
            raise PartError(f"{what} at byte {place}: what follows would be read in part")
        else:
            break  # tags of other kinds
    # some encoders count the header's own frame; the bytes that it states tell a cut file from theirs
    at, flags = _side_info(first), header[_side_info(first) + 7 :][:1] or b"\0"
    missing_bytes = flags[0] & 3 == 3 and len(data) - start < int.from_bytes(header[at + 12 : at + 16], "big")
    if stated and (abs(count - stated) > 1 or (count < stated and missing_bytes)):
        what = "truncated" if count < stated else "more than one recording"
        raise PartError(f"{what}: it has {count} mp3 frames, its header says {stated}")
    return max(0, count * first.samples - spare), last_end


def _frame(data: bytes, place: int) -> _Frame | None:
    head = data[place : place + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer, index, rate = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or index in (0, 15) or rate == 3:
        return None
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kbit = _KBIT[(1, layer) if version == 3 else (2, min(layer, 2))][index]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1_152
    slot = 4 if layer == 1 else 1
    size = (samples // 8 * kbit * 1_000 // hertz // slot + (head[2] >> 1 & 1)) * slot
    return _Frame(size, samples, (version, layer, hertz, head[3] >> 6 == 3))


def _next_frame(data: bytes, place: int) -> int:
    """The next position where two frames of one kind follow each other, the second perhaps cut; else the end."""
    while (place := data.find(b"\xff", place)) >= 0:
        if frame := _frame(data, place):
            following = _frame(data, place + frame.size)
            if following and following.kind == frame.kind:
                return place
        place += 1
    return len(data)


def _length_header(frame: bytes, form: _Frame) -> tuple[int | None, int]:
    """(frames, samples of delay and padding) of a Xing, Info or VBRI header, 0 where it does not say; (None, 0) of a
    frame that holds sound."""
    place = _side_info(form)
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big"), 0
    if frame[place : place + 4] not in (b"Xing", b"Info"):
        return None, 0
    flags = int.from_bytes(frame[place + 4 : place + 8], "big")
    frames = int.from_bytes(frame[place + 8 : place + 12], "big") if flags & 1 else 0
    delays = int.from_bytes(frame[place + 141 : place + 144], "big") if flags & 15 == 15 else 0
    return frames, (delays >> 12) + (delays & 0xFFF)


def _side_info(frame: _Frame) -> int:
    """Bytes of a layer III frame before its sound: header and side information."""
    version, _, _, mono = frame.kind
    return 4 + ((17 if mono else 32) if version == 3 else (9 if mono else 17))
