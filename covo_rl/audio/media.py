"""Sound in the containers of phones, browsers and videos (m4a, mp4, mov, webm, mkv, wma, aac), decoded by PyAV.

FFmpeg reads what it can and says nothing of the rest, so the containers are walked here: every box, element, object or
frame must be whole. What is decoded must then have no gap and be as long as the container says.

An encoder begins with samples of its own (priming, 1,024 of AAC, 312 of Opus at 48 kHz). Those that the container
states, by an edit list or as codec delay, are left out; an aac stream states none and keeps them. What fills the last
frame of AAC stays: under 1,024 samples.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from covo_rl.audio.streams import PartError, after_tags

#: So many frames may be missing: priming that a tag of iTunes states is left out, and counted in the length.
_SLACK_FRAMES = 3
#: Seconds between the end of one frame and the start of the next that are no rounding, nor the jitter of a recorder.
_GAP = 0.1


class Media(NamedTuple):
    """`what` it is for a message, and FFmpeg's name of the container."""

    what: str
    demuxer: str


_MP4, _MKV = Media("an MPEG-4 file (m4a, mp4, mov)", "mov"), Media("a Matroska file (webm, mkv)", "matroska")
_ASF, _AAC = Media("a Windows Media file (wma, asf)", "asf"), Media("an AAC stream", "aac")
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide")


def media_kind(data: bytes) -> Media | None:
    """What the first bytes of a file tell; None of what soundfile is for."""
    if data[4:8] in _BOXES:
        return _MP4
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return _MKV
    if data[:8] == b"\x30\x26\xb2\x75\x8e\x66\xcf\x11":
        return _ASF
    head = data[after_tags(data, 0) :][:2]
    return _AAC if len(head) == 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 else None


def decode_media(data: bytes, kind: Media, limit: Callable[[int, int], int]) -> tuple[np.ndarray, int]:
    """(samples, channels) as the codec has them, and the rate in Hz. `limit(channels, rate)` is the most samples.

    Raises:
        ImportError: PyAV is not there.
        PartError: cut, damaged or with a gap; no sound or several tracks of it; over the limit.
    """
    import av
    from av.codec.context import Flags2
    from av.error import FFmpegError

    whole = _WALKS[kind.demuxer](data)
    # what FFmpeg would skip in silence is an error; no other file is opened for this one
    strict = {"err_detect": "crccheck+bitstream+buffer+explode"}
    try:
        file = io.BytesIO(data)
        with av.open(file, format=kind.demuxer, metadata_errors="replace") as container:
            tracks = container.streams.audio
            if len(tracks) != 1:
                what = f"it holds {len(tracks)} tracks of sound; keep one (`ffmpeg -i IN -map 0:a:0 OUT.wav`)"
                raise PartError(what if tracks else "it holds no sound")
            if tracks[0].codec_context is None:
                raise PartError("in a codec that FFmpeg does not know")
            _check_channels(tracks[0].codec_context.layout.nb_channels)
            tracks[0].codec_context.options = strict
            if kind is _ASF:  # which states no priming; FFmpeg leaves out twice what its own encoder begins with
                tracks[0].codec_context.flags2 |= Flags2.skip_manual
            values, rate, longest = _decoded(_frames(container, whole.packets), limit)
            expected = whole.seconds or _stated_seconds(container, tracks[0])
    except FFmpegError as error:
        raise PartError(f"damaged, it cannot be decoded: {error.strerror}") from error
    slack = 0 if kind is _ASF else _SLACK_FRAMES * longest  # which keeps two frames of priming
    if len(values) + slack < expected * rate:
        what = f"truncated, {len(values) / rate:.2f} of {expected:.2f} s can be decoded"
        raise PartError(what)
    return values, rate


def _decoded(frames: Iterable[Any], limit: Callable[[int, int], int]) -> tuple[np.ndarray, int, int]:
    """(all samples of the frames, their rate, samples of the longest)."""
    blocks: list[np.ndarray] = []
    total, form, end = 0, None, None
    for frame in frames:
        here = (frame.sample_rate, frame.format.name, frame.layout.nb_channels)
        form = form or here
        _check_channels(here[2])
        if here != form:
            raise PartError(f"its rate or number of channels changes, {form} to {here}")
        if total > limit(here[2], here[0]):
            raise PartError(f"over {total / here[0]:.0f} s when decoded: cut it into several files")
        if None not in (end, frame.time) and (gap := frame.time - end) > _GAP:
            raise PartError(f"damaged, {gap:.2f} s are missing after {total / here[0]:.2f} s")
        end = None if frame.time is None else frame.time + frame.samples / here[0]
        block = frame.to_ndarray()
        blocks.append(block.T if frame.format.is_planar else block.reshape(-1, here[2]))
        total += len(blocks[-1])
    if form is None:
        raise PartError("no sample of it can be decoded")
    return np.concatenate(blocks), form[0], max(map(len, blocks))


def _check_channels(count: int) -> None:
    # PyAV reads beyond the planes of a damaged file that claims eight
    if count not in (1, 2):
        raise PartError(f"it has {count} channels, one or two are read: mix it down first")


def _frames(container: Any, least: int) -> Iterator[Any]:
    """Frames of sound, of at least so many packets of all tracks."""
    count = 0
    for packet in container.demux():
        if packet.is_corrupt:
            raise PartError(f"damaged, a packet at byte {packet.pos} is not whole")
        count += packet.size > 0
        if packet.stream.type == "audio":
            yield from packet.decode()
    if count < least:
        raise PartError(f"damaged, {count} of its {least} packets can be read")


def _stated_seconds(container: Any, track: Any) -> float:
    """How long the container says that the track is; 0 where it does not."""
    if track.duration and track.time_base:
        return float(track.duration * track.time_base)
    if match := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", track.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, match.groups())
        return 3_600 * hours + 60 * minutes + seconds
    is_alone = len(container.streams) == 1  # else the longest of them
    return (container.duration or 0) / 1e6 if is_alone else 0.0


# -- containers, walked ----------------------------------------------------------------------------------------------


class _Whole(NamedTuple):
    """What a container holds, as far as its parts tell: 0 where they do not."""

    seconds: float = 0.0
    packets: int = 0


def _walk_boxes(data: bytes) -> _Whole:
    """ISO base media: boxes of a size and a name up to the end."""
    place, kinds, end = 0, [], len(data.rstrip(b"\0"))  # what fills a file up is no box
    while place < end:
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        size = len(data) - place if size == 0 else size
        if size < 8 or len(kind) < 4 or not kind.isascii():
            raise PartError(f"damaged, no box starts at byte {place}")
        if place + size > len(data):
            raise PartError(f"truncated, its last box ({kind.decode()}) is cut")
        place += size
        kinds.append(kind)
    if b"moov" not in kinds:
        raise PartError("truncated, its table of contents (moov) is missing: was the recording ended?")
    if kinds.count(b"moov") > 1:
        raise PartError("it holds more than one recording, of which one would be read")
    return _Whole()


#: Matroska: what is walked into, and what else is at its two upper levels.
_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_ELEMENTS = frozenset((
    0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367,  # of a segment
    0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xAF, 0x5854,  # of a cluster
    0xEC, 0xBF,
))  # fmt: skip


def _walk_elements(data: bytes) -> _Whole:
    """EBML: elements of an identity and a size; segments and clusters from a browser do not know theirs."""
    place, headers, blocks = 0, 0, 0
    while place < len(data):
        start = place
        identity, place = _number(data, place, 4, keep_marker=True)
        size, place = _number(data, place, 8)
        if identity in (_SEGMENT, _CLUSTER):
            if size is not None and place + size > len(data):
                raise PartError(f"truncated, it goes on for {place + size - len(data)} bytes more")
            continue
        headers += identity == _EBML
        if headers > 1:
            raise PartError(f"another recording starts at byte {start}, which would not be read")
        if identity != _EBML and identity not in _ELEMENTS:
            raise PartError(f"damaged, no element starts at byte {start}")
        if size is None or place + size > len(data):
            raise PartError(f"truncated, its element at byte {start} is cut")
        blocks += identity in (0xA3, 0xA0)
        place += size
    return _Whole(packets=blocks)


def _number(data: bytes, place: int, most: int, *, keep_marker: bool = False) -> tuple[int | None, int]:
    """(number of variable length, position behind it); None is the size that says `unknown`."""
    length = 9 - data[place].bit_length() if place < len(data) else 9
    if length > most or place + length > len(data):
        raise PartError(f"truncated or damaged at byte {place}")
    value = int.from_bytes(data[place : place + length], "big")
    bits = value & ((1 << 7 * length) - 1)
    if keep_marker:
        return value, place + length
    return None if bits == (1 << 7 * length) - 1 else bits, place + length


def _walk_objects(data: bytes) -> _Whole:
    """ASF: objects of an identity of 16 bytes and a size."""
    place = 0
    while place < len(data):
        size = int.from_bytes(data[place + 16 : place + 24], "little")
        if place and data[place : place + 8] == data[:8]:
            raise PartError(f"another recording starts at byte {place}, which would not be read")
        if size < 24 or place + size > len(data):
            raise PartError(f"truncated or damaged, its object at byte {place} is not whole")
        place += size
    return _Whole()


_ADTS_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)


def _walk_adts(data: bytes) -> _Whole:
    """ADTS: frames of 1,024 samples, one behind the other."""
    place, first, count = after_tags(data, 0), None, 0
    while place < len(data):
        if data[place : place + 3] == b"TAG" or (tags := after_tags(data, place)) > place:
            place = place + 128 if data[place : place + 3] == b"TAG" else tags
            continue
        head = data[place : place + 7]
        if head[:1] != b"\xff"[: len(head)] or (len(head) > 1 and head[1] & 0xF6 != 0xF0):
            raise PartError(f"damaged, no AAC frame starts at byte {place}")
        size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5 if len(head) == 7 else 7
        if size < 7 or place + size > len(data):
            raise PartError(f"truncated, its last AAC frame is cut at byte {place}")
        form = head[2] & 0xFD, head[3] & 0xC0  # profile, rate and channels
        first = first or form
        if form != first or (head[2] >> 2 & 15) >= len(_ADTS_RATES):
            raise PartError(f"damaged, or its rate or number of channels changes at byte {place}")
        count, place = count + 1 + (head[6] & 3), place + size
    return _Whole(count * 1_024 / _ADTS_RATES[first[0] >> 2 & 15]) if first else _Whole()


_WALKS: Mapping[str, Callable[[bytes], _Whole]] = {
    "mov": _walk_boxes, "matroska": _walk_elements, "asf": _walk_objects, "aac": _walk_adts,
}  # fmt: skip
