"""Whether a file is whole and one recording, by its container. libsndfile reads what it can and says nothing of the
rest: of a cut file the start, of two recordings in one file the first.

RIFF and RF64 (EBU Tech 3306), AIFF and CAF are lists of sized chunks, AU has one size, and the last frame of a FLAC
(RFC 9639) says where it stands. Ogg and mp3, which are streams, have a module of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from covo_rl.audio.streams import PartError, after_id3, is_mp3, mp3_samples, mp3_with_length, ogg_ended, ogg_problem

#: Writers that cannot seek back leave these, or something near 2 GiB, instead of a size.
_UNKNOWN_SIZES = (0xFFFFFFFF, 0xFFFFFFFE)
_NEAR_2_GIB = range(0x7FFF_0000, 0x8000_0001)
#: Chunks without samples, which may be cut or have a wrong size.
_METADATA = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"_PMX", b"cue ", b"smpl", b"JUNK", b"ANNO")
#: What may follow the samples and be no chunk: an ID3v1 tag, some padding.
_MAX_TAIL = 256
#: The largest FLAC frame: 65,535 samples of 8 channels in 32 bits.
_FLAC_FRAME = 2**21
#: Bytes of a sample by the encoding of an AU; of others, one.
_AU_BYTES = {3: 2, 4: 3, 5: 4, 6: 4, 7: 8}
_BLOCK_SIZES = (0, 192, *(576 << n for n in range(4)), 0, 0, *(256 << n for n in range(8)))


def prepared(data: bytes) -> bytes:
    """What libsndfile is to read: the file, with a length where its writer could state none (FLAC from a pipe, mp3),
    with an end (Ogg), without an ID3 tag before a container that has none.

    Raises:
        PartError: a FLAC without a length whose last frame is cut; an mp3 that would be read in part.
    """
    start = after_id3(data, 0)
    if data[start : start + 4] in (b"RIFF", b"RIFX", b"RF64", b"FORM", b"fLaC", b"OggS", b"caff", b".snd"):
        data = data[start:] if start else data
    if data[:4] == b"OggS":
        return ogg_ended(data)
    if is_mp3(data):
        return mp3_with_length(data)
    if data[:4] != b"fLaC" or len(data) < 42 or _flac_total(data):
        return data
    candidates = [pair for pair, _ in zip(_flac_frames(data), range(4), strict=False)]
    ends = [end for place, end in candidates if not _crc(data[place:], 0x8005, 16)]
    if not ends:
        raise PartError("truncated, its last FLAC frame is cut")
    total = ends[0]
    return data[:21] + bytes([data[21] & 0xF0 | total >> 32]) + (total & 0xFFFFFFFF).to_bytes(4, "big") + data[26:]


def whole_samples(data: bytes, container: str) -> int:
    """Samples per channel that must come out of a whole file; 0 where the container cannot say.

    `container` is soundfile's name of the format.

    Raises:
        PartError: the end is missing, or more follows than will be read.
    """
    if container in ("WAV", "WAVEX", "RF64"):
        _check_chunks(data, b"data", "big" if data[:4] == b"RIFX" else "little")
    elif container == "AIFF":
        _check_chunks(data, b"SSND", "big")
    elif container == "CAF":
        _check_chunks(data, b"data", "big", header=8, width=8, aligned=False)
    elif container == "AU":
        order: Literal["big", "little"] = "big" if data[:4] == b".snd" else "little"
        start, length, encoding, _, channels = (int.from_bytes(data[n : n + 4], order) for n in range(4, 24, 4))
        if not _check_size(data, start, length, _AU_BYTES.get(encoding, 1) * channels):
            _check_tail(data, start + length)
    elif container == "OGG" and (problem := ogg_problem(data)):
        raise PartError(problem)
    elif container == "MP3":
        return mp3_samples(data)
    elif container == "FLAC":
        total = _flac_total(data)
        if data.find(b"fLaC\0\0\0\x22", 4) > 0:
            raise PartError("it holds more than one recording, of which the first would be read")
        if total and all(end != total for _, end in _flac_frames(data)):
            raise PartError(f"truncated, or its header is of another file: no last frame ends at its {total} samples")
        return total
    return 0


# -- chunks ----------------------------------------------------------------------------------------------------------


def _check_chunks(
    data: bytes, samples: bytes, order: Literal["big", "little"], *, header: int = 12, width: int = 4,
    aligned: bool = True,
) -> None:  # fmt: skip
    """Walk the chunks: the samples must be there as promised, once, and be followed by chunks alone."""
    place, long_size, block, seen = header, 0, 1, False
    while place + 4 + width <= len(data):
        name, start = data[place : place + 4], place + 4 + width
        length = int.from_bytes(data[place + 4 : start], order)
        if seen and (name in (samples, b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff")):
            raise PartError("it holds more than one recording or block of samples, of which the first would be read")
        if seen and name not in _METADATA and not (_is_name(name) and start + length <= len(data)):
            return _check_tail(data, place)
        if name == b"ds64":
            long_size = int.from_bytes(data[start + 8 : start + 16], "little")
        elif name == b"fmt ":
            block = int.from_bytes(data[start + 12 : start + 14], order) or 1
        elif name == samples:
            seen = True
            if length in _UNKNOWN_SIZES or length == 2**64 - 1:
                length = long_size or length
            # some writers count their own header as samples
            counts_header = length in (len(data), len(data) - 8) and int.from_bytes(data[4:8], order) + 8 <= len(data)
            if counts_header or _check_size(data, start, length, block):
                return None
        place = start + length + (length % 2 if aligned else 0)
        if aligned and length % 2 and not _is_name(data[place : place + 4]) and _is_name(data[place - 1 : place + 3]):
            place -= 1  # some writers leave the padding out
    return _check_tail(data, place) if seen else None


def _check_size(data: bytes, start: int, length: int, block: int = 1) -> bool:
    """Compare the promised bytes of samples with those from `start` on; whether the size is unknown."""
    there = len(data) - start
    if length in _UNKNOWN_SIZES or length == 2**64 - 1 or (length in _NEAR_2_GIB and length > there):
        if (rest := there % block) and not (rest == 1 and there % 2 == 0):
            raise PartError(f"truncated, its last sample is cut ({there} bytes in blocks of {block})")
        return True
    if length > there:
        raise PartError(f"truncated, its header promises {length} bytes of samples, {there} follow")
    if length == 0 and there > 8 and not _is_name(data[start : start + 4]):
        raise PartError(f"its header says that no samples follow, {there} bytes do: the writer never finished it")
    return False


def _check_tail(data: bytes, place: int) -> None:
    tail = len(data[place:].rstrip(b"\0"))
    if tail > _MAX_TAIL:
        raise PartError(f"{tail} bytes follow the samples that its header counts: was it written on after that?")


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= byte < 127 for byte in name)


# -- FLAC ------------------------------------------------------------------------------------------------------------


def _flac_total(data: bytes) -> int:
    """Samples per channel by STREAMINFO, which is always the first block; 0: unknown."""
    return int.from_bytes(data[21:26], "big") & 0xF_FFFF_FFFF


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


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    top, mask, value = 1 << (bits - 1), (1 << bits) - 1, 0
    table = []
    for byte in range(256):
        entry = byte << (bits - 8)
        for _ in range(8):
            entry = (entry << 1 ^ polynomial if entry & top else entry << 1) & mask
        table.append(entry)
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> (bits - 8) ^ byte]
    return value
