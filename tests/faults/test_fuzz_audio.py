"""2,400 mutated audio files: each is decoded or refused with one AudioError that names it; never a crash or a hang.

The mutants are decoded in a process of its own, since libsndfile is C: if it dies, the last line says at which file.
By hand, with more files: python tests/faults/test_fuzz_audio.py SEED COUNT
"""

import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from covo_rl.audio import AudioError, audio_fingerprint, decode
from covo_rl.types import Clip

KINDS = {
    "wav": [("WAV", "PCM_16", 1), ("WAV", "PCM_U8", 2), ("WAV", "PCM_24", 1), ("WAV", "FLOAT", 2), ("WAV", "DOUBLE", 1),
            ("WAV", "ULAW", 1), ("WAV", "IMA_ADPCM", 1), ("WAV", "MS_ADPCM", 2), ("WAV", "GSM610", 1),
            ("WAVEX", "PCM_16", 2), ("RF64", "PCM_16", 1)],
    "flac": [("FLAC", "PCM_16", 1), ("FLAC", "PCM_24", 2), ("FLAC", "PCM_S8", 1)],
    "mp3": [("MP3", "MPEG_LAYER_III", 1), ("MP3", "MPEG_LAYER_III", 2)],
    "ogg": [("OGG", "VORBIS", 1), ("OGG", "VORBIS", 2), ("OGG", "OPUS", 1)],
}  # fmt: skip
#: Bytes from the start of which most are header.
HEADER = {"wav": 100, "flac": 90, "mp3": 500, "ogg": 200}
EXTREMES = [bytes.fromhex(text) for text in ("00", "ff", "7f", "80", "00000000", "ffffffff", "ffffff7f", "7fffffff",
                                             "00000080", "01000000", "00000001")]  # fmt: skip
#: A single file of a tenth of a second takes milliseconds.
SECONDS_PER_FILE = 5
MEMORY = 6 * 2**30


def seeds():
    rng = np.random.default_rng(0)
    found = {}
    for kind, variants in KINDS.items():
        found[kind] = []
        for container, subtype, channels in variants:
            values = rng.uniform(-0.5, 0.5, (2400, channels))
            buffer = io.BytesIO()
            soundfile.write(buffer, values, 24_000, format=container, subtype=subtype)
            found[kind].append(buffer.getvalue())
    return found


def mutate(data, kind, others, rng):
    """One to four changes: bytes set, extreme values over fields, blocks removed, repeated, swapped, spliced, cut."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        limit = min(len(data), HEADER[kind]) if rng.random() < 0.8 else len(data)
        if limit < 2:
            break
        place = int(rng.integers(0, limit))
        length = int(rng.integers(1, 64))
        match rng.integers(0, 8):
            case 0:
                data[place] = rng.integers(0, 256)
            case 1:
                data[place] ^= 1 << int(rng.integers(0, 8))
            case 2 | 3:
                value = EXTREMES[rng.integers(0, len(EXTREMES))]
                data[place : place + len(value)] = value
            case 4:
                del data[place : place + length]
            case 5:
                data[place:place] = data[place : place + length]
            case 6:
                other = others[rng.integers(0, len(others))]
                at = int(rng.integers(0, len(other)))
                data[place : place + length] = other[at : at + length]
            case 7:
                del data[int(rng.integers(place, len(data))) :]
    if kind == "ogg" and rng.random() < 0.7:
        fix_ogg_checksums(data)
    return bytes(data)


def crc_table():
    table = []
    for value in range(256):
        crc = value << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)
        table.append(crc & 0xFFFFFFFF)
    return table


CRC = crc_table()


def fix_ogg_checksums(data):
    """Make every page valid again (RFC 3533), so that the codec behind the container sees the mutation."""
    place = data.find(b"OggS")
    while 0 <= place <= len(data) - 27:
        header = 27 + data[place + 26]
        end = place + header + sum(data[place + 27 : place + header])
        page = data[place:end]
        page[22:26] = bytes(4)
        crc = 0
        for byte in page:
            crc = ((crc << 8) & 0xFFFFFFFF) ^ CRC[(crc >> 24) ^ byte]
        data[place + 22 : place + 26] = crc.to_bytes(4, "little")
        place = data.find(b"OggS", max(end, place + 1))


def try_one(clip):
    """decoded or refused; anything else propagates."""
    try:
        waveform, rate = decode(clip)
    except AudioError as error:
        assert str(error).startswith(f"{clip.name}: ")
        return "refused"
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert np.isfinite(waveform).all() and len(waveform) >= 0.01 * rate
    assert len(audio_fingerprint(waveform, rate)) == 64
    return "decoded"


def work(seed, count, folder):
    """Decode `count` mutants, printing the number of each before it is opened and at the end a summary."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rng = np.random.default_rng(seed)
    originals = seeds()
    outcomes = {kind: {"decoded": 0, "refused": 0} for kind in KINDS}
    slowest = 0.0
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        data = mutate(originals[kind][rng.integers(0, len(originals[kind]))], kind, originals[kind], rng)
        clip = Clip(data=data)
        if number % 3 == 0:
            (folder / "mutant").write_bytes(data)
            clip = Clip(path=str(folder / "mutant"))
        print(number, flush=True)
        # The default action ends the process: the only thing that stops a loop in C.
        signal.alarm(SECONDS_PER_FILE)
        started = time.perf_counter()
        outcomes[kind][try_one(clip)] += 1
        slowest = max(slowest, time.perf_counter() - started)
        signal.alarm(0)
    print(json.dumps({"outcomes": outcomes, "slowest": slowest}))


def test_the_originals_decode():
    for kind, files in seeds().items():
        for data in files:
            assert try_one(Clip(data=data)) == "decoded", kind


def test_repaired_checksums_are_those_of_the_encoder():
    for data in seeds()["ogg"]:
        again = bytearray(data)
        fix_ogg_checksums(again)
        assert bytes(again) == data


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_files_are_decoded_or_refused(seed):
    count = 1_200
    done = subprocess.run(
        [sys.executable, __file__, str(seed), str(count)], capture_output=True, text=True, timeout=100, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "nothing"
    assert done.returncode == 0, f"the process died with {done.returncode} at file {last}:\n{done.stderr[-3000:]}"
    assert [int(line) for line in lines[:-1]] == list(range(count))
    outcomes = json.loads(last)["outcomes"]
    assert sum(n for kind in outcomes.values() for n in kind.values()) == count
    # Neither outcome is the rule: the mutants are neither hopeless nor harmless.
    assert all(kind["decoded"] > 10 and kind["refused"] > 30 for kind in outcomes.values()), outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        work(int(sys.argv[1]), int(sys.argv[2]), Path(name))
