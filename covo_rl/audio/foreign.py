"""What a file is that is not read, and what to do about it."""

from __future__ import annotations

import re
from pathlib import PurePath

from covo_rl.audio.media import media_kind

_CONVERT = "convert it: `ffmpeg -i {name} {out}`"
_UNPACK = "unpack it first"
_AGAIN = "copy or fetch the file again"
#: (position, first bytes, what it is, what to do)
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"#!AMR", "an AMR file", _CONVERT),
    (0, b"wvpk", "a WavPack file", _CONVERT),
    (0, b"MAC ", "a Monkey's Audio file", _CONVERT),
    (0, b"TTA1", "a True Audio file", _CONVERT),
    (0, b"DSD ", "a DSD file", _CONVERT),
    (0, b"FLV", "a Flash video", _CONVERT),
    (8, b"AVI ", "an AVI video", _CONVERT),
    (8, b"WAVE", "a wav file that is damaged, or in a codec that is not read here", _CONVERT),
    (8, b"AIF", "an aiff file that is damaged, or in a codec that is not read here", _CONVERT),
    (0, b"caff", "a CAF file that is damaged, or in a codec that is not read here", _CONVERT),
    (0, b"OggS", "an Ogg file that is damaged, or holds no Vorbis, Opus or FLAC", _CONVERT),
    (0, b"fLaC", "a FLAC file that is damaged", _AGAIN),
    (8, b"WEBP", "a WebP picture", _AGAIN),
    (0, b".RMF", "a RealMedia file", _CONVERT),
    (0, b"MThd", "a MIDI file, which holds notes and no sound", "render it first"),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"Rar!", "a rar archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x93NUMPY", "a numpy array", "write it as wav (soundfile.write)"),
    (0, b"PAR1", "a parquet table", "name it as the question set"),
    (0, b"\x89PNG", "a PNG picture", _AGAIN),
    (0, b"\xff\xd8\xff", "a JPEG picture", _AGAIN),
    (0, b"GIF8", "a GIF picture", _AGAIN),
    (0, b"%PDF", "a PDF document", _AGAIN),
    (0, b"version https://git-lfs", "a Git LFS pointer in place of the file", "run `git lfs pull`"),
)
#: Samples without a header: what ffmpeg must be told, by the end of the name.
_HEADERLESS = {
    "g722": "g722", "ulaw": "mulaw", "ul": "mulaw", "alaw": "alaw", "al": "alaw", "sln": "s16le", "raw": "s16le",
    "pcm": "s16le", "vox": "s16le",
}  # fmt: skip
_GSM_FRAME = 33


def is_gsm(data: bytes) -> bool:
    """Whether the bytes are GSM 06.10 frames without a header: 33 bytes each, the first half byte is 0xD."""
    return len(data) >= _GSM_FRAME and not len(data) % _GSM_FRAME and {b >> 4 for b in data[::_GSM_FRAME]} == {0xD}


def explain(data: bytes, name: str) -> str:
    """`what the file is: what to do`, of a file that libsndfile does not read."""
    path = _file_name(name)
    what, remedy = _kind(data, path.suffix.lower().lstrip("."))
    return f"{what}; {remedy.format(name=path.name, out=_wav_name(name))}"


def conversion(name: str) -> str:
    """The command that writes a file as wav."""
    return _CONVERT.format(name=_file_name(name).name, out=_wav_name(name))


def _file_name(name: str) -> PurePath:
    return PurePath("IN" if name.startswith("<") else name)


def _wav_name(name: str) -> str:
    path = _file_name(name)
    return "OUT.wav" if name.startswith("<") else f"{path.stem}{'-new' * (path.suffix == '.wav')}.wav"


def _kind(data: bytes, suffix: str) -> tuple[str, str]:
    if not data:
        return "an empty file", _AGAIN
    if (media := media_kind(data)) is not None:
        return media.what, f"`pip install 'covo-rl[media]'` reads it, or {_CONVERT}"
    for place, magic, what, remedy in _MAGIC:
        if data[place : place + len(magic)] == magic:
            return what, remedy
    if not data.strip(b"\0"):
        return "zero bytes alone, as an unfinished copy leaves them", _AGAIN
    text = _text(data[:2_000])
    if text is not None and re.match(r"(?i)\s*(<!doctype html|<html|<head|<body|<\?xml|<!--)", text):
        return "a web page (HTML or XML), as a failed download leaves it", "fetch the file again"
    if text is not None:
        return f"a text that starts {text[:40]!r}", _AGAIN
    if suffix == "gsm":
        return "no whole GSM 06.10 stream (frames of 33 bytes): cut or damaged", _AGAIN
    if suffix in _HEADERLESS:
        rate = "" if suffix == "g722" else " -ar RATE -ac 1"
        wav = f"`ffmpeg -f {_HEADERLESS[suffix]}{rate} -i {{name}} {{out}}`"
        return f"samples without a header (.{suffix})", f"convert it with what you know of them: {wav}"
    return f"of no known format, it starts {data[:8].hex(' ')}", f"if ffmpeg plays it, {_CONVERT}"


def _text(data: bytes) -> str | None:
    """The bytes as text, or None where they are none; the last character may be cut."""
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(data) - 3:
            return None
        text = data[: error.start].decode("utf-8-sig", "replace")
    return text if all(c.isprintable() or c.isspace() for c in text) else None
