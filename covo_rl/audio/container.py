"""Whether a file is whole and one recording, by its container. libsndfile reads what it can and says nothing of the
rest: of a cut file the start, of two recordings in one file the first.

RIFF and RF64 (EBU Tech 3306), AIFF and CAF are lists of sized chunks, AU has one size, and the last frame of a FLAC
(RFC 9639) says where it stands. Ogg and mp3, which are streams, have a module of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal

from covo_rl.audio.streams import PartError, after_tags, whole_mp3, whole_ogg

#: Writers that cannot seek back leave these, or something near 2 GiB, instead of a size.
_UNKNOWN_SIZES = (0xFFFFFFFF, 0xFFFFFFFE, 2**64 - 1)
_NEAR_2_GIB = range(0x7FFF_0000, 0x8000_0001)
#: Chunks without samples, which may be cut or have a wrong size.
_METADATA = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"_PMX", b"cue ", b"smpl", b"JUNK", b"ANNO")
#: Of a wav, whose samples have so many bytes as their bits need: PCM, float, and what WAVE_FORMAT_EXTENSIBLE names.
_PLAIN_CODECS = (1, 3, 0xFFFE)
#: What may follow the samples and be no chunk: an ID3v1 tag, some padding.
_MAX_TAIL = 256
#: The largest FLAC frame: 65,535 samples of 8 channels in 32 bits.
_FLAC_FRAME = 2**21
#: Bytes of a sample by the encoding of an AU; of others, one.
_AU_BYTES = {3: 2, 4: 3, 5: 4, 6: 4, 7: 8}
_BLOCK_SIZES = (0, 192, *(576 << n for n in range(4)), 0, 0, *(256 << n for n in range(8)))
Order = Literal["big", "little"]


def whole_file(data: bytes) -> tuple[bytes, int]:
    """(What libsndfile is to read, samples per channel that must come of it or 0 where the container cannot say.)

    That is the file with a length where its writer could state none (FLAC from a pipe, mp3), with an end (Ogg), and
    without tags before its container.

    Raises:
        PartError: the end is missing, or more follows than will be read.
    """
    tags = after_tags(data, 0)
    if data[tags : tags + 4] in (b"RIFF", b"RIFX", b"RF64", b"FORM", b"fLaC", b"OggS", b"caff", b".snd", b"dns."):
        data = data[tags:] if tags else data
    magic, kind = data[:4], data[8:12]
    if magic == b"OggS":
        data = whole_ogg(data)
        return _whole_flac(data) if data[:4] == b"fLaC" else (data, 0)
    if magic == b"fLaC":
        return _whole_flac(data)
    if kind == b"WAVE" and magic in (b"RIFF", b"RIFX", b"RF64"):
        _check_chunks(data, b"data", "big" if magic == b"RIFX" else "little")
        if data[12:16] == b"fmt " and data[20:22] == b"\x55\0":  # mp3 in a wav
            return whole_mp3(data[data.find(b"data") + 8 :])
    elif kind in (b"AIFF", b"AIFC") and magic == b"FORM":
        return data, _check_chunks(data, b"SSND", "big")
    elif magic == b"caff":
        _check_chunks(data, b"data", "big", header=8, width=8, aligned=False)
    elif magic in (b".snd", b"dns."):
        order: Order = "big" if magic == b".snd" else "little"
        start, length, encoding, _, channels = (int.from_bytes(data[n : n + 4], order) for n in range(4, 24, 4))
        if not _check_size(data, start, length, _AU_BYTES.get(encoding, 1) * channels):
            _check_tail(data, start + length)
    else:
        return whole_mp3(data)
    return data, 0


# -- chunks ----------------------------------------------------------------------------------------------------------


def _check_chunks(
    data: bytes, samples: bytes, order: Order, *, header: int = 12, width: int = 4, aligned: bool = True
) -> int:  # fmt: skip
    """Walk the chunks: the samples must be there as promised, once, and be followed by chunks alone.

    Returns the samples per channel that an AIFF states, else 0.
    """
    place, long_size, block, frames, seen = header, 0, 1, 0, False
    while place + 4 + width <= len(data):
        name, start = data[place : place + 4], place + 4 + width
        length = int.from_bytes(data[place + 4 : start], order)
        if seen and (name in (samples, b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff")):
            raise PartError("it holds more than one recording or block of samples, of which the first would be read")
        if seen and name not in _METADATA and not (_is_name(name) and start + length <= len(data)):
            break
        if name == b"ds64":
            long_size = int.from_bytes(data[start + 8 : start + 16], "little")
        elif name == b"fmt ":
            codec, channels, _, _, _, _, block, bits = (
                int.from_bytes(data[n : n + 2], order) for n in range(start, start + 16, 2)
            )
            if codec in _PLAIN_CODECS and channels in (1, 2) and block != channels * -(-bits // 8):
                raise PartError(f"damaged, its header counts {block} bytes for {channels} channels of {bits} bits")
        elif name == b"COMM":
            frames = int.from_bytes(data[start + 2 : start + 6], order)
        elif name == samples:
            seen = True
            if length in _UNKNOWN_SIZES:
                length = long_size or length
            # some writers count their own header as samples
            counts_header = length in (len(data), len(data) - 8) and int.from_bytes(data[4:8], order) + 8 <= len(data)
            if counts_header or _check_size(data, start, length, block):
                return 0
        place = start + length + (length % 2 if aligned else 0)
        if aligned and length % 2 and not _is_name(data[place : place + 4]) and _is_name(data[place - 1 : place + 3]):
            place -= 1  # some writers leave the padding out
    if seen:
        _check_tail(data, place, 8 + int.from_bytes(data[4:8], order) if aligned else 0)
    return frames


def _check_size(data: bytes, start: int, length: int, block: int = 1) -> bool:
    """Compare the promised bytes of samples with those from `start` on; whether the size is unknown."""
    there = len(data) - start
    if length in _UNKNOWN_SIZES or (length in _NEAR_2_GIB and length > there):
        if (rest := there % max(1, block)) and not (rest == 1 and there % 2 == 0):
            raise PartError(f"truncated, its last sample is cut ({there} bytes in blocks of {block})")
        return True
    if length > there:
        raise PartError(f"truncated, its header promises {length} bytes of samples, {there} follow")
    if length == 0 and there > 8 and not _is_name(data[start : start + 4]):
        raise PartError(f"its header says that no samples follow, {there} bytes do: the writer never finished it")
    return False


def _check_tail(data: bytes, place: int, end: int = 0) -> None:
    """What follows the samples and is no chunk must be short, and lie behind the `end` that the header states."""
    tail = len(data[place:].rstrip(b"\0"))
    counted = place < end <= len(data) and not data.startswith(b"TAG", place) and data[place:end].strip(b"\0")
    if tail > _MAX_TAIL or counted:
        raise PartError(f"{tail} bytes follow the samples that its header counts: was it written on after that?")


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= byte < 127 for byte in name)


# -- FLAC ------------------------------------------------------------------------------------------------------------


def _whole_flac(data: bytes) -> tuple[bytes, int]:
    """See `whole_file`: STREAMINFO, which is always the first block and states the length, and the frames."""
    if data[5:8] != b"\0\0\x22" or data[4] & 0x7F:
        return data, 0
    place, is_last = 4, 0
    while not is_last and place < len(data):
        is_last = data[place] & 0x80
        place += 4 + int.from_bytes(data[place + 1 : place + 4], "big")
    info, frames = data[8:42], data[place:]
    if b"fLaC\0\0\0\x22" in frames or b"fLaC\x80\0\0\x22" in frames:
        raise PartError("it holds more than one recording, of which the first would be read")
    total, last = int.from_bytes(info[13:18], "big") & 0xF_FFFF_FFFF, 0
    stream = b"fLaC\x80\0\0\x22" + info + frames
    for number, (at, end) in enumerate(_flac_frames(stream)):
        if end == total:
            return stream, total
        if number < 4 and not _crc(stream[at:], 0x8005, 16):  # a whole frame, not what looks like one
            last = end
            break
    if total:
        raise PartError(f"truncated, or its header is of another file: no last frame ends at its {total} samples")
    if not last:
        raise PartError("truncated, its last FLAC frame is cut")
    return stream[:21] + bytes([stream[21] & 0xF0 | last >> 32]) + last.to_bytes(5, "big")[1:] + stream[26:], last


def _flac_frames(data: bytes) -> Iterator[tuple[int, int]]:
    """(position, sample after its last one) of what looks like a frame header, from the end of the file."""
    place = len(data)
    while (place := data.rfind(b"\xff", max(42, len(data) - _FLAC_FRAME), place)) > 0:
        if (end := _flac_frame_end(data, place)) is not None:
            yield place, end


def _flac_frame_end(data: bytes, place: int) -> int | None:
    head = data[place : place + 16]
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[2] & 15 == 15 or head[3] >> 4 > 10 or head[3] & 1:
        return None
    ones = 8 - (head[4] ^ 0xFF).bit_length()
    if ones in (1, 8):
        return None
    number, at = head[4] & (0x7F >> ones), 4 + max(1, ones)
    for byte in head[5:at]:
        number = number << 6 | byte & 0x3F
    code, rate = head[2] >> 4, head[2] & 15
    extra = {6: 1, 7: 2}.get(code, 0)
    size = int.from_bytes(head[at : at + extra], "big") + 1 if extra else _BLOCK_SIZES[code]
    at += extra + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if not size or at >= len(head) or _crc(head[:at], 0x07, 8) != head[at]:
        return None
    is_variable, fixed_size = head[1] & 1, int.from_bytes(data[10:12], "big")
    return (number if is_variable else number * fixed_size) + size


@cache
def _crc_table(polynomial: int, bits: int) -> list[int]:
    top, mask, table = 1 << (bits - 1), (1 << bits) - 1, []
    for byte in range(256):
        entry = byte << (bits - 8)
        for _ in range(8):
            entry = (entry << 1 ^ polynomial if entry & top else entry << 1) & mask
        table.append(entry)
    return table


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    table, mask, value = _crc_table(polynomial, bits), (1 << bits) - 1, 0
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> (bits - 8) ^ byte]
    return value
