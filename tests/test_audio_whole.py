"""A file is read whole or refused, with what it is and what to do: nothing in part, nothing that cancels out."""

import contextlib
import gzip
import importlib
import io
import os
import struct

import numpy as np
import pytest
import soundfile

from covo_rl.audio import AudioError, ClipStore, decode
from covo_rl.audio.streams import _checksum, _frame, _page
from covo_rl.config import PromptConfig
from covo_rl.prompt import PromptError, build_prompt
from covo_rl.types import Clip, Example

RATE = 16_000
RNG = np.random.default_rng(0)
ID3 = b"ID3\4\0\0\0\0\0\x0a" + bytes(10)
TAG = b"TAG" + b"x" * 125


def noise(seconds=3.0, channels=1, rate=RATE):
    shape = (int(seconds * rate), channels) if channels > 1 else int(seconds * rate)
    return (0.1 * RNG.standard_normal(shape)).clip(-0.9, 0.9).astype(np.float32)


def encoded(container, subtype=None, values=None, rate=RATE, **options):
    buffer = io.BytesIO()
    values = noise(rate=rate) if values is None else values
    soundfile.write(buffer, values, rate, format=container, subtype=subtype, **options)
    return buffer.getvalue()


def length(data):
    return len(decode(Clip(data=bytes(data)))[0])


def refused(data, said):
    with pytest.raises(AudioError, match=said):
        decode(Clip(data=bytes(data)))


def patched(data, place, value, order="<"):
    return data[:place] + struct.pack(f"{order}I", value) + data[place + 4 :]


def ogg_pages(data):
    pages, place = [], 0
    while place < len(data):
        size = _page(data, place)[1]
        pages.append(data[place : place + size])
        place += size
    return pages


def flagged(page, flags, serial=None):
    """An Ogg page with other flags or another serial number, its checksum mended."""
    page = bytearray(page)
    page[5] = flags
    page[14:18] = page[14:18] if serial is None else struct.pack("<I", serial)
    page[22:26] = struct.pack("<I", _checksum(page))
    return bytes(page)


# -- what is cut, doubled or damaged ---------------------------------------------------------------------------------

FORMATS = [
    ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"),
    ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("AU", "ULAW"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"), ("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "subtype"), FORMATS)
def test_a_cut_or_doubled_file_is_refused_in_every_format(container, subtype):
    """finding 34: a cut .au gave 0.6 of 2 s; of two recordings in one file the first was read."""
    data = encoded(container, subtype)
    assert length(data) == 3 * RATE
    padding = 1 if container == "CAF" else 0
    for missing in (1 + padding, 7, 44, 500, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(AudioError):
            decode(Clip(data=data[:-missing]))
    refused(data + data, "more than one|another recording|2 streams|follow the samples")


@pytest.mark.parametrize(("container", "subtype"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_a_flipped_bit_never_shortens_a_clip(container, subtype):
    """finding 34: libogg drops a page whose checksum is wrong, and the rest plays on."""
    data = encoded(container, subtype)
    for place in range(200, len(data), len(data) // 25):
        broken = bytearray(data)
        broken[place] ^= 4
        with pytest.raises(AudioError):
            decode(Clip(data=bytes(broken)))


def test_an_ogg_of_several_streams_is_named():
    """finding 34: chained Vorbis, Opus and FLAC, and streams side by side."""
    one, two = encoded("OGG", "VORBIS"), encoded("OGG", "OPUS")
    refused(one + two, r"2 streams \(Vorbis, Opus\)")
    pages, others = ogg_pages(one), [flagged(page, page[5], serial=7) for page in ogg_pages(one)]
    refused(b"".join([pages[0], others[0], *pages[1:], *others[1:]]), "side by side")
    refused(b"".join(pages[:3] + pages[4:]), "page of its Ogg stream is missing")
    refused(b"".join(pages[:3]) + b"junk" + b"".join(pages[3:]), "no Ogg page starts at byte")
    assert length(one + TAG) == 3 * RATE


@pytest.mark.parametrize(("subtype", "seconds"), [("VORBIS", 0.3), ("VORBIS", 2.6), ("OPUS", 0.3), ("OPUS", 2.6)])
def test_an_ogg_without_its_end_flag_is_read_and_a_cut_one_is_not(subtype, seconds):
    """finding 43: 550 of 11,311 files of an old encoder lack the flag; a cut file ends in a full page."""
    data = encoded("OGG", subtype, 0.3 * np.sin(np.arange(int(seconds * RATE)) / 9) + noise(seconds))
    *pages, last = ogg_pages(data)
    assert last[5] & 4
    assert length(b"".join([*pages, flagged(last, last[5] & ~4)])) == int(seconds * RATE)
    for count in range(1, len(pages) + 1):
        with pytest.raises(AudioError):
            decode(Clip(data=b"".join(pages[:count])))


def test_an_mp3_without_a_length_is_read_whole():
    """finding 34: libsndfile guesses the length of a variable bit rate from its first frames and reads half of it."""
    for rate, channels in ((16_000, 1), (44_100, 1), (44_100, 2), (8_000, 1)):
        data = encoded("MP3", None, noise(2.2, channels, rate), rate, bitrate_mode="VARIABLE")
        frame = _frame(data, 0)
        assert frame
        assert length(data) == int(2.2 * rate)
        bare = data[frame.size :]  # without the Xing header
        count = length(bare)  # whole frames, less the 529 samples by which every decoder is late
        assert 2.2 * rate < count < 2.2 * rate + 3 * 1152 and (count + 529) % frame.samples == 0
        assert length(bare + bare) == 2 * (count + 529) - 529  # two such files are one longer one
        assert length(ID3 + bytes(2_000) + bare) == count  # padding behind a tag
        refused(bare[:-20], "last mp3 frame is cut")


def test_what_lies_between_mp3_frames():
    """finding 34: concatenated or rate-changing mp3, tags at either end and in the middle."""
    mono = encoded("MP3")
    frame = _frame(mono, 0)
    assert frame
    bare = mono[frame.size :]
    for data in (ID3 + mono, mono + TAG, ID3 + mono + b"APETAGEX" + bytes(400), mono + bytes(3000)):
        assert length(data) == 3 * RATE
    refused(mono + ID3 + mono, "another recording starts at byte")
    refused(mono + TAG + mono, "another recording starts at byte")
    for other in (encoded("MP3", None, noise(1, 2)), encoded("MP3", None, noise(1, 1, 44_100), 44_100)):
        refused(bare + other, "rate or number of channels changes")
    cut = 4_000
    refused(bare[:cut] + b"junk" * 20 + bare[cut:], "damaged at byte")


def test_flac_from_a_pipe_does_not_state_its_length():
    """finding 34: total samples 0 is valid by RFC 9639; what is cut is refused nevertheless."""
    cases = ((3, 1, 16_000, "PCM_16"), (0.7, 2, 44_100, "PCM_24"), (0.02, 1, 8_000, "PCM_16"))
    for seconds, channels, rate, subtype in cases:
        data = encoded("FLAC", subtype, noise(seconds, channels, rate), rate)
        piped = data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]
        np.testing.assert_array_equal(decode(Clip(data=piped))[0], decode(Clip(data=data))[0])
        for missing in (1, 2, 100):
            refused(piped[:-missing], "last FLAC frame is cut")
    refused(patched(data, 22, 100, ">"), "no last frame ends at its 100 samples")
    assert length(data + TAG) == length(ID3 + data) == 160


def test_wav_sizes_and_what_follows_the_samples():
    """finding 34: unknown sizes are read, unfinished, stale and double ones are not."""
    wav = encoded("WAV", "PCM_16")
    head, size = wav[:36], len(wav) - 44
    for unknown in (0xFFFFFFFF, 0x7FFFF000, 0x80000000):  # ffmpeg, sox, arecord to a pipe
        assert length(patched(wav, 40, unknown)) == 3 * RATE
        refused(patched(wav, 40, unknown)[:-1], "last sample is cut")
    piped = patched(encoded("AU", "PCM_24"), 8, 0xFFFFFFFF, ">")
    assert length(piped) == 3 * RATE
    refused(piped[:-1], "last sample is cut")
    refused(patched(wav, 40, 0), "never finished")
    refused(patched(wav, 40, size // 2), "written on after that")
    half = b"data" + struct.pack("<I", size // 2) + wav[44 : 44 + size // 2]
    refused(head + half + half, "more than one")
    chunk = b"LIST" + struct.pack("<I", 5) + b"abcde"
    following = b"id3 " + struct.pack("<I", 4) + b"abcd"
    long_chunk = b"LIST" + struct.pack("<I", 9_000) + b"INFO" * 500  # cut, or of a wrong size
    for rest in (chunk + b"\0" + following, chunk + following, bytes(5_000), TAG, long_chunk):
        assert length(wav + rest) == 3 * RATE
    assert length(head + chunk + b"\0" + wav[36:]) == 3 * RATE == length(ID3 + wav)
    assert length(patched(wav, 40, len(wav))) == 3 * RATE  # a writer that counts its own header
    refused(head + b"data" + bytes(4) + following, "no samples")


# -- what other programs write ---------------------------------------------------------------------------------------


def ape(size, footer=True):
    head = b"APETAGEX" + struct.pack("<III", 2_000, size + 32, 1)
    return head + struct.pack("<I", 0xA0000000) + bytes(8) + b"k" * size + (head + b"\0\0\0\x80" + bytes(8)) * footer


def flac_parts(data):
    """STREAMINFO and frames of a FLAC."""
    place, is_last = 4, 0
    while not is_last:
        is_last = data[place] & 0x80
        place += 4 + int.from_bytes(data[place + 1 : place + 4], "big")
    return data[8:42], data[place:]


def ogg_of(packets):
    """One page for each packet, as ffmpeg writes FLAC into Ogg."""
    result = b""
    for number, packet in enumerate(packets):
        flags = 2 * (number == 0) | 4 * (number == len(packets) - 1)
        table = b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255])
        head = b"OggS\0" + bytes([flags]) + struct.pack("<qIII", 0, 7, number, 0) + bytes([len(table)])
        result += flagged(head + table + packet, flags)
    return result


def test_an_ogg_flac_is_read_as_its_flac():
    """finding 34: libsndfile has "unknown error in flac decoder" for those of ffmpeg."""
    data = encoded("FLAC", "PCM_16", noise(0.2))
    info, frames = flac_parts(data)
    first = b"\x7fFLAC\1\0\0\1fLaC\0\0\0\x22" + info
    packets = [first, b"\x84\0\x80\0" + bytes(0x8000), frames]
    np.testing.assert_array_equal(decode(Clip(data=ogg_of(packets)))[0], decode(Clip(data=data))[0])
    refused(ogg_of([*packets[:2], frames[:-1]]), "lost sync")
    refused(ogg_of(packets[:2]), "truncated")


def test_metadata_of_a_flac_is_not_looked_at():
    """finding 34: a picture that libFLAC does not understand, or that holds a FLAC, refuses no sound."""
    data = encoded("FLAC", "PCM_16")
    info, frames = flac_parts(data)
    for picture in (bytes(70_000), b"x" + data, b""):
        assert (
            length(b"fLaC\0\0\0\x22" + info + b"\x86" + len(picture).to_bytes(3, "big") + picture + frames) == 3 * RATE
        )
    ends = [4_096 * n for n in range(1, 11)]  # a total at which an inner frame ends
    for total in (ends[0], ends[5], ends[-1]):
        refused(patched(data, 22, total, ">"), "no last frame ends at")


def test_tags_around_an_mp3():
    """finding 34: padding, APE tags and an ID3 footer hide the first frame from libsndfile."""
    for data in (encoded("MP3"), encoded("MP3", bitrate_mode="VARIABLE")):
        footer = b"ID3\4\0\x10\0\0\0\x0a" + bytes(10) + b"3DI\4\0\x10\0\0\0\x0a"
        big = b"ID3\3\0\0\0\x0a\0\0" + b"\x55" * (10 << 14)
        for before in (ID3 + bytes(4_000), footer, big, ape(300), ID3 + ape(40), ID3 + ID3):
            assert length(before + data) == 3 * RATE
        for after in (ape(300, footer=True) + TAG, ape(90).replace(b"kk", b"\xff\xfb"), footer, TAG + TAG):
            assert length(data + after) == 3 * RATE


def test_an_mp3_whose_first_or_last_frame_is_not_read_is_refused():
    """finding 34: a tag that claims frames, a header that counts one more, a first frame of another kind."""
    data = encoded("MP3")
    first, last = _frame(data, 0), 0
    assert first
    while (frame := _frame(data, last)) and last + frame.size < len(data):
        last += frame.size
    refused(data[:last], "truncated: it has")
    tag = b"ID3\4\0\0\0\0"
    for frames in (1, 3, 8):
        claimed = 10 + frames * first.size
        refused(tag + bytes([claimed >> 7, claimed & 127]) + bytes(10) + data, "longer than it is")
    bare = data[first.size :]
    for place, bit in ((1, 8), (2, 0x0C)):
        refused(bare[:place] + bytes([bare[place] ^ bit]) + bare[place + 1 :], "damaged|changes|not readable")


def test_a_wav_whose_header_contradicts_itself_is_refused():
    """finding 34: a flipped bit in the number of bits read half the samples, one in the size lost the last ones."""
    wav = encoded("WAV", "PCM_16")
    refused(wav[:34] + b"\x12" + wav[35:], "2 bytes for 1 channels of 18 bits")
    refused(patched(wav, 40, len(wav) - 44 - 16), "16 bytes follow the samples")
    aiff = encoded("AIFF", "PCM_16")
    place = aiff.index(b"SSND") + 8
    refused(patched(aiff, place, 512, ">"), "truncated")


def test_an_mp3_in_a_wav_is_read_as_the_mp3():
    """finding 34: the frames of the wav's header are a guess."""
    mp3 = encoded("MP3")
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 4_000, 1, 0, 12, 1, 2, 144, 1, 1393)
    chunks = b"WAVEfmt " + struct.pack("<I", 30) + form + b"data" + struct.pack("<I", len(mp3)) + mp3
    wav = b"RIFF" + struct.pack("<I", len(chunks)) + chunks
    assert length(wav) == 3 * RATE
    refused(wav[:-100], "truncated")


def test_no_damage_leaves_the_audio_room_as_another_error(capfd):
    """finding 34: a cut or flipped file is refused or has its length; nothing is printed by Python."""
    random = np.random.default_rng(3)
    for container, subtype in FORMATS:
        data = encoded(container, subtype, noise(0.5))
        for place in random.integers(1, len(data), 12):
            flipped = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
            for damaged in (data[:place], flipped):
                with contextlib.suppress(AudioError):
                    assert len(decode(Clip(data=damaged))[0]) >= RATE // 2
    assert "Traceback" not in capfd.readouterr().err


# -- two channels ----------------------------------------------------------------------------------------------------


def stereo(left, right):
    return np.stack([left, right], axis=1).astype(np.float32)


TONES = sum(0.1 * np.sin(2 * np.pi * f * np.arange(2 * RATE) / RATE) for f in (300, 700, 1_900)) + noise(2) / 10


@pytest.mark.parametrize(
    ("container", "subtype"), [("WAV", "PCM_16"), ("MP3", None), ("OGG", "VORBIS"), ("FLAC", "PCM_16")]
)
@pytest.mark.parametrize("factor", [-1, -0.97])
def test_antiphase_is_refused_after_lossy_coding_too(container, subtype, factor):
    """finding 34: mp3 and Ogg leave -45 to -80 dB of the sound, which passed."""
    refused(encoded(container, subtype, stereo(TONES, factor * TONES)), "channels cancel out")


def test_how_much_may_cancel_out():
    """finding 34: part of the time, or of the frequencies; ordinary stereo passes."""
    low, high = np.sin(np.arange(2 * RATE) / 20), np.sin(np.arange(2 * RATE) * 1.1)
    half = np.where(np.arange(2 * RATE) < RATE, TONES, -TONES)
    for left, right in ((TONES, half), (0.2 * (low + high), 0.2 * (low - high))):
        refused(encoded("WAV", "FLOAT", stereo(left, right)), "(49|50|51)% of the sound is lost")
    delayed = np.roll(TONES, 9)
    pairs = [(noise(2), noise(2)), (TONES, delayed), (TONES, 0 * TONES), (TONES, -0.5 * TONES), (TONES, TONES)]
    for left, right in [*pairs, (0 * TONES, 0 * TONES)]:
        assert length(encoded("WAV", "FLOAT", stereo(left, right))) == 2 * RATE


# -- what is no audio, and what cannot be used -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.m4a", b"\0\0\0\x20ftypM4A \0\0\0\0", r"MPEG-4.*`ffmpeg -i x.m4a x.wav`"),
        ("x.wav", b"\0\0\0\x20ftypM4A \0\0\0\0", r"MPEG-4.*`ffmpeg -i x.wav x-new.wav`"),
        ("x.webm", b"\x1a\x45\xdf\xa3aaaa", "Matroska.*ffmpeg"),
        ("x.wma", bytes.fromhex("3026b2758e66cf11") + b"aaaa", "Windows Media.*ffmpeg"),
        ("x.amr", b"#!AMR\nabc", "AMR.*ffmpeg"),
        ("x.aac", b"\xff\xf1\x50\x80" + bytes(range(90)), "AAC.*ffmpeg"),
        ("x.wav", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "LFS.*`git lfs pull`"),
        ("x.wav", b"<!DOCTYPE html><html>404", "web page.*fetch"),
        ("x.mp3", b"Not found", "text that starts 'Not found'"),
        ("x.flac", b'{"error": 404}', "text that starts"),
        ("x.wav", b"", "an empty file"),
        ("x.wav", bytes(500), "zero bytes alone"),
        ("x.wav", gzip.compress(b"x", mtime=0), "gzip.*unpack"),
        ("x.wav", b"PK\3\4aaaa", "zip.*unpack"),
        ("x.g722", bytes(range(256)), r"without a header.*`ffmpeg -f g722 -i x.g722 x.wav`"),
        ("x.sln", bytes(range(256)), r"without a header.*`ffmpeg -f s16le -ar RATE -ac 1 -i x.sln x.wav`"),
        ("x.gsm", bytes(range(256)), "no whole GSM"),
        ("x.wav", bytes(range(1, 256)), "no known format.*01 02 03"),
        ("x.w64", encoded("W64", "PCM_16", noise(0.1)), "W64 is not read; use wav"),
    ],
)
def test_what_is_not_read_is_named_with_a_remedy(tmp_path, name, content, said):
    """finding 34: m4a, HTML, LFS pointers were "Format not recognised"."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=said):
        decode(Clip(path=str(tmp_path / name)))


def test_gsm_without_a_header_is_read():
    """finding 43: 33 bytes a frame, each starting with the half byte 0xD; 160 samples at 8 kHz."""
    data = encoded("RAW", "GSM610", noise(1, 1, 8_000), 8_000)
    waveform, rate = decode(Clip(data=data))
    assert (rate, len(waveform)) == (8_000, 160 * (len(data) // 33))


def test_a_bomb_is_an_audio_error_before_it_is_decoded():
    """finding 35: 4,000 s of digital silence are 60 kB of flac."""
    bomb = encoded("FLAC", "PCM_16", np.zeros(4_000 * 8_000, np.float32), 8_000)
    piped = bomb[:21] + bytes([bomb[21] & 0xF0]) + bytes(4) + bomb[26:]
    assert len(bomb) < 100_000
    for data in (bomb, piped):
        refused(data, "4000 s when decoded; at most 3600 s")


def test_too_little_memory_is_an_audio_error(monkeypatch):
    """finding 35: whatever the limits, no MemoryError leaves the audio room."""

    def none_left(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(importlib.import_module("covo_rl.audio.decode"), "_blocks", none_left)
    refused(encoded("WAV", "PCM_16"), "does not fit into memory")


def test_absurd_headers_and_samples():
    """finding 35: rates, channels and values that no recording has."""
    wav, floats = encoded("WAV", "PCM_16"), encoded("WAV", "FLOAT", noise(1, 2))
    refused(patched(wav, 24, 1), "rate of 1 Hz")
    refused(patched(wav, 24, 4_000_000_000), "damaged")
    refused(wav[:22] + b"\0\0" + wav[24:], "Channel count is zero")
    refused(wav[:22] + b"\xff\0" + wav[24:], "255 channels")
    place = floats.index(b"data") + 8
    for value, said in ((1e30, "reach 1e\\+30"), (float("nan"), "1 of 32000"), (-float("inf"), "1 of 32000")):
        refused(floats[:place] + struct.pack("<f", value) + floats[place + 4 :], said)


# -- files that change -----------------------------------------------------------------------------------------------


def test_a_file_replaced_or_deleted_during_a_run_is_noticed(tmp_path):
    """finding 35: the wav of a row was replaced and used with the old labels."""
    paths = [tmp_path / f"{name}.wav" for name in "abcd"]
    for path in paths:
        path.write_bytes(encoded("WAV", "PCM_16"))
    clips, store = [Clip(path=str(path)) for path in paths], ClipStore(memory_mb=0)
    store.watch(clips)
    keys = [store.key(clip) for clip in clips[:3]]
    status = os.stat(paths[0])
    paths[0].write_bytes(encoded("WAV", "PCM_16"))
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` does: same size, same time
    paths[1].unlink()
    os.utime(paths[2])
    paths[3].write_bytes(encoded("WAV", "PCM_16", noise(2)))  # before its first use
    for number, said in ((0, "changed since"), (1, "No such file"), (3, "changed since")):
        with pytest.raises(AudioError, match=f"{paths[number].name}.*{said}"):
            store.key(clips[number])
    for key, said in ((keys[0], "changed since"), (keys[1], "No such file")):
        with pytest.raises(AudioError, match=said):
            store.waveform(key)
    assert store.key(clips[2]) == keys[2] and len(store.waveform(keys[2])[0]) == 3 * RATE  # only touched


def test_a_changed_clip_is_named_with_its_row(tmp_path):
    """finding 35: the prompt of a row is where its clip is named again in every step."""

    class Family:
        audio_token_id = 7

        def clip_slots(self, waveform, rate):
            return 1

        def render(self, messages):
            return "x"

        def tokenize(self, text, slots):
            return [7] * sum(slots)

    family, path, store = Family(), tmp_path / "a.wav", ClipStore()
    path.write_bytes(encoded("WAV", "PCM_16"))
    example = Example("r17", (Clip(path=str(path)),), "?")
    assert build_prompt(example, family, store, PromptConfig()).slots == (1,)
    path.write_bytes(encoded("WAV", "PCM_16"))
    with pytest.raises(PromptError, match=r"row r17: .*a\.wav: the file has changed"):
        build_prompt(example, family, store, PromptConfig())
