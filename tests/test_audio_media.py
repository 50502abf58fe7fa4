"""m4a, mp4, mov, webm, mkv, wma and aac by PyAV: the whole sound, or an error. Small files are encoded here."""

import sys

import numpy as np
import pytest

from covo_rl.audio import AudioError, ClipStore, decode
from covo_rl.types import Clip
from tests.own_time import seconds

av = pytest.importorskip("av")
SECONDS = 0.6


def noise(rate, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (channels, int(rate * SECONDS))).astype(np.float32)


def encoded(folder, container, codec, rate, *sounds, bit_rate=None, **options):
    """A file with one track of each sound, (channels, samples)."""
    path = folder / "sound.bin"  # some containers are finished by going back in a file
    options = {name: str(value) for name, value in options.items()}
    with av.open(str(path), "w", format=container, options=options) as output:
        tracks = [output.add_stream(codec, rate=rate, layout=("mono", "stereo")[len(sound) - 1]) for sound in sounds]
        for track, sound in zip(tracks, sounds, strict=True):
            if bit_rate:
                track.bit_rate = bit_rate
            for start in range(0, sound.shape[1], 4_096):
                block = np.ascontiguousarray(sound[:, start : start + 4_096])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=track.layout.name)
                frame.sample_rate, frame.pts = rate, start
                output.mux(track.encode(frame))
            output.mux(track.encode(None))
    return path.read_bytes()


#: container, codec, rate, options; samples in front that the container does not name, the most at the end
CASES = {
    "m4a": ("ipod", "aac", 44_100, {}, 0, 1_023),
    "mp4": ("mp4", "aac", 16_000, {}, 0, 1_023),
    "table in front": ("mp4", "aac", 16_000, {"movflags": "faststart"}, 0, 1_023),
    "fragments": ("mp4", "aac", 16_000, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}, 1_024, 1_023),
    "mov": ("mov", "pcm_s16le", 16_000, {}, 0, 0),
    "lossless": ("ipod", "alac", 44_100, {}, 0, 0),
    "opus in mp4": ("mp4", "libopus", 48_000, {}, 0, 959),
    "webm": ("webm", "libopus", 48_000, {}, 0, 0),
    "from a browser": ("webm", "libopus", 48_000, {"live": 1}, 0, 0),
    "mkv": ("matroska", "aac", 16_000, {}, 0, 1_023),
    "flac in mkv": ("matroska", "flac", 16_000, {}, 0, 0),
    "wma": ("asf", "wmav2", 44_100, {"bit_rate": 64_000}, 2_048, 2_048),
    "aac": ("adts", "aac", 16_000, {}, 1_024, 1_023),
}
EXACT = ("lossless", "mov", "flac in mkv")


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_whole_sound_at_its_place(tmp_path, name, channels):
    container, codec, rate, options, front, end = CASES[name]
    sound = noise(rate, channels)
    data = encoded(tmp_path, container, codec, rate, sound, **options)
    waveform, own_rate = decode(Clip(data=data))
    size = sound.shape[1]
    assert own_rate == rate and waveform.dtype == np.float32
    assert 0 <= len(waveform) - size - front <= end
    # the original lies where it is said to: no other shift correlates as well
    spectra = [np.fft.rfft(part, 2 * len(waveform)) for part in (waveform, sound.mean(axis=0))]
    assert int(np.fft.irfft(spectra[0] * spectra[1].conj()).argmax()) == front
    if name in EXACT and channels == 1:
        assert np.abs(waveform - sound[0]).max() <= 2**-15


@pytest.mark.parametrize("name", CASES)
def test_a_cut_or_doubled_file_is_refused(tmp_path, name):
    container, codec, rate, options, *_ = CASES[name]
    data = encoded(tmp_path, container, codec, rate, noise(rate), **options)
    for share in (0.02, 0.3, 0.5, 0.7, 0.9, 0.99):
        with pytest.raises(
            AudioError, match=r"<bytes>: .*; copy the file again, or convert it: `ffmpeg -i IN OUT.wav`"
        ):
            decode(Clip(data=data[: int(share * len(data))]))
    with pytest.raises(AudioError):
        decode(Clip(data=data[:-1]))
    if name == "aac":  # a stream of frames has no beginning
        assert len(decode(Clip(data=data + data))[0]) == 2 * len(decode(Clip(data=data))[0])
    else:
        with pytest.raises(AudioError, match="recording"):
            decode(Clip(data=data + data))


@pytest.mark.parametrize("name", CASES)
def test_damage_amid_the_sound_never_shortens_it(tmp_path, name):
    container, codec, rate, options, *_ = CASES[name]
    data = encoded(tmp_path, container, codec, rate, noise(rate), **options)
    random, refused = np.random.default_rng(1), 0
    for place in random.integers(len(data) // 4, 3 * len(data) // 4, 25):
        damaged = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
        try:
            assert len(decode(Clip(data=damaged))[0]) >= SECONDS * rate
        except AudioError:
            refused += 1
    assert refused or codec in ("pcm_s16le", "libopus", "alac")  # which have no checksum


def test_a_missing_piece_of_a_recording_is_noticed(tmp_path):
    data = encoded(tmp_path, "matroska", "pcm_s16le", 16_000, np.tile(noise(16_000), 6), live=1, cluster_time_limit=200)
    starts = [place for place in range(len(data)) if data[place : place + 4] == b"\x1f\x43\xb6\x75"]
    assert len(starts) > 3 and len(decode(Clip(data=data))[0]) == 6 * 9_600
    with pytest.raises(AudioError, match=r"s are missing after \d"):
        decode(Clip(data=data[: starts[1]] + data[starts[2] :]))


def test_several_tracks_and_channels_are_refused_and_a_film_has_one_track(tmp_path):
    for container, codec in (("mp4", "aac"), ("matroska", "flac")):
        data = encoded(tmp_path, container, codec, 16_000, noise(16_000), noise(16_000, seed=1))
        with pytest.raises(AudioError, match=r"2 tracks of sound; keep one \(`ffmpeg -i IN -map 0:a:0 OUT.wav`\)"):
            decode(Clip(data=data))
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as output:
        pictures, sound = output.add_stream("mpeg4", rate=10), output.add_stream("aac", rate=16_000, layout="mono")
        pictures.width = pictures.height = 32
        pictures.pix_fmt = "yuv420p"
        frame = av.AudioFrame.from_ndarray(noise(16_000), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        for number in range(6):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            picture.pts = number
            output.mux(pictures.encode(picture))
        for track, item in ((sound, frame), (sound, None), (pictures, None)):
            output.mux(track.encode(item))
    assert 9_600 <= len(decode(Clip(path=str(path)))[0]) < 9_600 + 1_024
    with av.open(str(tmp_path / "mute.mp4"), "w") as output:
        pictures = output.add_stream("mpeg4", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        output.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        output.mux(pictures.encode(None))
    with pytest.raises(AudioError, match="it holds no sound"):
        decode(Clip(path=str(tmp_path / "mute.mp4")))
    six = tmp_path / "six.mka"
    with av.open(str(six), "w", format="matroska") as output:
        track = output.add_stream("flac", rate=16_000, layout="5.1")
        block = np.zeros((1, 6 * 4_096), np.int16)
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout="5.1")
        frame.sample_rate, frame.pts = 16_000, 0
        output.mux([*track.encode(frame), *track.encode(None)])
    with pytest.raises(AudioError, match="it has 6 channels, one or two are read"):
        decode(Clip(path=str(six)))


def test_channels_that_a_damaged_header_claims_are_not_looked_for(tmp_path):
    """Reading the planes of eight channels where there is one ends the process."""
    data = bytearray(encoded(tmp_path, "ipod", "aac", 44_100, noise(44_100)))
    place = data.find(b"\x05\x80\x80\x80\x05") + 6  # of AudioSpecificConfig the byte with the channels
    assert place > 6 and data[place] >> 3 & 15 == 1
    data[place] = data[place] & 0x87 | 7 << 3
    with pytest.raises(AudioError, match="it has 8 channels, one or two are read"):
        decode(Clip(data=bytes(data)))


def test_many_small_boxes_take_no_longer_than_their_bytes():
    clip = Clip(data=b"\0\0\0\x10ftypM4A \0\0\0\0" + b"\0\0\0\x08free" * 250_000)

    def refuse():
        with pytest.raises(AudioError, match="moov"):
            decode(clip)

    assert seconds(refuse) < 5


def test_the_rules_of_two_channels_and_of_length_hold(tmp_path, monkeypatch):
    sound = noise(16_000)
    data = encoded(tmp_path, "ipod", "alac", 16_000, np.concatenate([sound, -sound]))
    with pytest.raises(AudioError, match="its two channels cancel out"):
        decode(Clip(data=data))
    monkeypatch.setattr(sys.modules["covo_rl.audio.decode"], "MAX_SECONDS", 0.2)
    with pytest.raises(AudioError, match="s when decoded: cut it into several files"):
        decode(Clip(data=encoded(tmp_path, "mp4", "aac", 16_000, sound)))


def test_without_pyav_the_extra_and_the_conversion_are_named(tmp_path, monkeypatch):
    data = encoded(tmp_path, "ipod", "aac", 16_000, noise(16_000))
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "voice.m4a").write_bytes(data)
    with pytest.raises(AudioError) as caught:
        decode(Clip(path=str(tmp_path / "voice.m4a")))
    says = "an MPEG-4 file (m4a, mp4, mov); `pip install 'covo-rl[media]'` reads it, or convert it: "
    assert str(caught.value) == f"{tmp_path}/voice.m4a: {says}`ffmpeg -i voice.m4a voice.wav`"


def test_tags_around_an_aac_stream(tmp_path):
    data = encoded(tmp_path, "adts", "aac", 16_000, noise(16_000))
    size = len(decode(Clip(data=data))[0])
    tag = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)
    assert len(decode(Clip(data=tag + data + b"TAG" + bytes(125)))[0]) == size
    with pytest.raises(AudioError, match="no AAC frame starts at byte"):
        decode(Clip(data=data + b"garbage that is no frame"))


def test_store_and_rows_take_them_like_any_other(tmp_path):
    from covo_rl.data import load_examples

    path = tmp_path / "a.m4a"
    path.write_bytes(encoded(tmp_path, "ipod", "aac", 16_000, noise(16_000)))
    (example,) = load_examples([{"audio": path, "question": "What?", "answer": "noise"}])
    store = ClipStore()
    waveform, rate = store.waveform(store.key(example.clips[0]))
    assert rate == 16_000 and len(waveform) >= 9_600
