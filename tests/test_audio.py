import io
import threading

import numpy as np
import pytest
import soundfile

from covo_rl.audio import AudioError, ClipStore, audio_fingerprint, content_key, decode, resample, to_mono
from covo_rl.types import Clip

RATE = 16_000
TONE = (0.4 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
NOISY = TONE + 0.01 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)


def encoded(container, subtype=None, values=NOISY, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


# -- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "subtype", "error"),
    [
        ("WAV", "PCM_16", 2e-5), ("WAV", "PCM_24", 2e-7), ("WAV", "FLOAT", 0), ("WAV", "DOUBLE", 0),
        ("WAV", "PCM_U8", 5e-3), ("RF64", "PCM_16", 2e-5), ("FLAC", "PCM_16", 2e-5),
        ("AIFF", "PCM_16", 2e-5), ("MP3", None, 2e-2),
        ("OGG", "VORBIS", 2e-2), ("OGG", "OPUS", 5e-2),
    ],
)  # fmt: skip
def test_every_format_from_bytes_and_path(tmp_path, container, subtype, error):
    data = encoded(container, subtype)
    waveform, rate = decode(Clip(data=data))
    assert (waveform.dtype, waveform.shape, rate) == (np.float32, (RATE,), RATE)
    assert rms(waveform - NOISY) <= error
    path = tmp_path / "clip.opus"
    path.write_bytes(data)
    np.testing.assert_array_equal(decode(Clip(path=str(path)))[0], waveform)
    assert len(waveform) / rate == 1.0  # seconds


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([0, 16384, -32768], np.int16), [0, 0.5, -1]),
        (np.array([0, 2**30, -(2**31)], np.int32), [0, 0.5, -1]),
        (np.array([128, 192, 0], np.uint8), [0, 0.5, -1]),
        (np.array([0, 0.5, -1], np.float64), [0, 0.5, -1]),
        (np.array([0, 1.5, -1], np.float32), [0, 1.5, -1]),
    ],
)
def test_integer_pcm_is_scaled_and_float_is_kept(array, expected):
    waveform, _ = decode(Clip(array=np.repeat(array, 100), sampling_rate=8000))
    np.testing.assert_allclose(waveform, np.repeat(expected, 100), atol=1e-7)
    assert waveform.dtype == np.float32


def test_case_1_one_channel_stays():
    np.testing.assert_array_equal(to_mono(TONE), TONE)
    np.testing.assert_array_equal(to_mono(TONE[:, None]), TONE)


def test_case_2_two_channels_are_averaged_both_heard():
    left_only = np.stack([TONE, np.zeros_like(TONE)], axis=1)
    np.testing.assert_allclose(to_mono(left_only), TONE / 2)
    np.testing.assert_allclose(to_mono(left_only[:, ::-1]), TONE / 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((100, 0), np.float32), "no channels"),
        (np.ones((100, 3), np.float32), "3 channels"),
        (np.ones((2, 100), np.float32), r"\(samples, channels\)"),
        (np.stack([TONE, -TONE], axis=1), "cancel out"),
    ],
)
def test_cases_3_and_4_are_refused(values, said):
    with pytest.raises(AudioError, match=said):
        to_mono(values, "x.wav")


def test_six_channel_file_is_refused(tmp_path):
    path = tmp_path / "surround.wav"
    soundfile.write(path, np.ones((RATE, 6), np.float32) * 0.1, RATE)
    with pytest.raises(AudioError, match=r"surround\.wav.*6 channels"):
        decode(Clip(path=str(path)))


@pytest.mark.parametrize(
    ("array", "rate", "said"),
    [
        (np.zeros(0, np.float32), RATE, "no samples"),
        (np.zeros(159, np.float32), RATE, "9.9 ms long"),
        (np.where(np.arange(RATE) == 7, np.nan, TONE).astype(np.float32), RATE, "1 of 16000 samples are NaN"),
        (np.where(np.arange(RATE) < 3, np.inf, TONE).astype(np.float32), RATE, "3 of 16000 samples"),
        (np.where(np.arange(RATE) < 2, [-np.inf] * RATE, np.inf), RATE, "16000 of 16000 samples"),
        (np.full(RATE, 1e300), RATE, "infinite"),
        (TONE * 20_000, RATE, "scale them"),
        (np.ones(RATE, np.int64), RATE, "int64"),
        (np.array(["a"] * 200), RATE, "<U1"),
        (np.ones((2, 3, 4), np.float32), RATE, r"\(2, 3, 4\)"),
        (TONE, 1, "1 Hz"),
        (TONE, 10**9, "1000000000 Hz"),
        (TONE, 16000.5, "16000.5"),
    ],
)
def test_unusable_arrays(array, rate, said):
    with pytest.raises(AudioError, match=said):
        decode(Clip(array=array, sampling_rate=rate))


def test_nan_in_a_float_wav():
    values = NOISY.copy()
    values[5] = np.nan
    with pytest.raises(AudioError, match="1 of 16000 samples"):
        decode(Clip(data=encoded("WAV", "FLOAT", values)))


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("RF64", "PCM_16"), ("AIFF", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", None), ("OGG", "VORBIS"),
     ("OGG", "OPUS")],
)  # fmt: skip
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_truncated_files_are_refused_not_read_in_part(container, subtype, share):
    noise = np.random.default_rng(1).standard_normal(3 * RATE).astype(np.float32) * 0.1
    data = encoded(container, subtype, noise)
    decode(Clip(data=data))
    with pytest.raises(AudioError, match=r"truncated|cannot be decoded"):
        decode(Clip(data=data[: int(share * len(data))]))


def test_a_wav_written_to_a_pipe_has_no_length_and_is_fine():
    data = bytearray(encoded("WAV", "PCM_16"))
    at = data.index(b"data")
    data[at + 4 : at + 8] = b"\xff\xff\xff\xff"
    assert len(decode(Clip(data=bytes(data)))[0]) == RATE


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "not a regular file"),
        (lambda p: p.write_bytes(b""), "not readable as audio"),
        (lambda p: p.write_text("<html>404</html>" * 99), "not readable as audio"),
        (lambda p: p.write_bytes(encoded("WAV", "PCM_16")[:30]), "not readable as audio"),
        (lambda p: p.write_bytes(encoded("AU", "PCM_16", np.zeros(0, np.float32))), "no samples"),
        (lambda p: p.write_bytes(encoded("VOC", "PCM_U8")), "VOC.*is not read"),
    ],
)
def test_unusable_files_are_named(tmp_path, make, said):
    path = tmp_path / "bad clip.wav"
    make(path)
    with pytest.raises(AudioError, match=f"bad clip.wav: .*{said}"):
        decode(Clip(path=str(path)))


def test_odd_paths():
    for path in ("", "a\0b.wav", "x" * 5000):
        with pytest.raises(AudioError):
            decode(Clip(path=path))
        with pytest.raises(AudioError):
            content_key(Clip(path=path))


def test_a_header_that_promises_terabytes_costs_no_memory():
    data = bytearray(encoded("FLAC", "PCM_16"))
    data[22:26] = b"\xff\xff\xff\xff"  # STREAMINFO: the lower 32 bits of the number of samples
    with pytest.raises(AudioError, match=r"truncated|cannot be decoded"):
        decode(Clip(data=bytes(data)))


# -- resampling ------------------------------------------------------------------------------------------------------


def tone(frequency, rate, seconds=0.5):
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def test_resampling_keeps_a_tone_and_removes_what_cannot_be_represented():
    out = resample(tone(1000, 48_000), 48_000, 16_000)
    assert out.dtype == np.float32 and len(out) == 8000
    np.testing.assert_allclose(out[500:-500], tone(1000, 16_000)[500:-500], atol=1e-3)
    assert rms(resample(tone(10_000, 48_000), 48_000, 16_000)[500:-500]) < 1e-4
    back = resample(out, 16_000, 48_000)
    np.testing.assert_allclose(back[2000:-2000], tone(1000, 48_000)[2000:-2000], atol=2e-3)
    assert resample(out, 16_000, 16_000) is out


def test_resampling_refuses_impossible_rates_and_shapes():
    with pytest.raises(ValueError, match="from 1 to 16000"):
        resample(TONE, 1, RATE)
    with pytest.raises(ValueError, match=r"\(16000, 1\)"):
        resample(TONE[:, None], 16_000, 8000)


# -- identity --------------------------------------------------------------------------------------------------------


def test_content_key_is_of_the_bytes(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded("WAV", "PCM_16"))
    assert content_key(Clip(path=str(path))) == content_key(Clip(data=path.read_bytes()))
    assert content_key(Clip(data=b"")) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    keys = {
        content_key(clip)
        for clip in (
            Clip(array=TONE, sampling_rate=RATE), Clip(array=TONE, sampling_rate=8000),
            Clip(array=TONE[:-1], sampling_rate=RATE), Clip(array=TONE.astype(np.float64), sampling_rate=RATE),
            Clip(array=TONE.reshape(-1, 2), sampling_rate=RATE),
        )
    }  # fmt: skip
    assert len(keys) == 5
    assert content_key(Clip(array=TONE[::2], sampling_rate=RATE)) == content_key(
        Clip(array=TONE[::2].copy(), sampling_rate=RATE)
    )


def test_fingerprint_is_of_the_sound():
    pcm = (NOISY * 32_767).astype(np.int16)
    stereo = np.stack([pcm, pcm], axis=1)
    padded = np.concatenate([np.zeros(100, np.int16), pcm, np.zeros(37, np.int16)])
    same = [
        Clip(data=encoded("WAV", "PCM_16", pcm)), Clip(data=encoded("FLAC", "PCM_16", pcm)),
        Clip(data=encoded("WAV", "FLOAT", (pcm / 32_768).astype(np.float32))),
        Clip(data=encoded("AIFF", "PCM_24", pcm)), Clip(data=encoded("WAV", "PCM_16", stereo)),
        Clip(array=pcm, sampling_rate=RATE),
        Clip(data=encoded("FLAC", "PCM_16", padded)),
    ]  # fmt: skip
    other = [
        Clip(array=pcm, sampling_rate=8000), Clip(array=pcm[:-1], sampling_rate=RATE),
        Clip(array=-pcm, sampling_rate=RATE), Clip(array=np.zeros(500), sampling_rate=RATE),
        Clip(array=np.zeros(600), sampling_rate=RATE),
    ]  # fmt: skip
    assert len({audio_fingerprint(*decode(clip)) for clip in same}) == 1
    assert len({audio_fingerprint(*decode(clip)) for clip in [same[0], *other]}) == 6


# -- store -----------------------------------------------------------------------------------------------------------


def files(folder, count, samples=2**16):
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.wav" for i in range(count)]
    for path in paths:
        soundfile.write(path, rng.uniform(-0.5, 0.5, samples).astype(np.float32), RATE, subtype="FLOAT")
    return [Clip(path=str(path)) for path in paths]


def test_store_keeps_what_fits_and_decodes_the_rest_again(tmp_path):
    clips = files(tmp_path, 4)  # 0.25 MB each
    store = ClipStore(memory_mb=0.5)
    keys = [store.key(clip) for clip in clips]
    for key in keys:
        store.waveform(key)
    assert (store.decoded, store.evicted, store.hits, len(store), store.used_mb) == (4, 2, 0, 2, 0.5)
    store.waveform(keys[3]), store.waveform(keys[2])
    assert (store.decoded, store.hits) == (4, 2)
    waveform, rate = store.waveform(keys[0])  # evicts 3, the least recently used
    assert (store.decoded, store.evicted, rate) == (5, 3, RATE)
    np.testing.assert_array_equal(waveform, decode(clips[0])[0])
    store.waveform(keys[2])
    assert store.hits == 3


def test_store_without_room_keeps_nothing(tmp_path):
    store = ClipStore(memory_mb=0)
    key = store.key(files(tmp_path, 1)[0])
    for _ in range(2):
        store.waveform(key)
    assert (store.decoded, len(store), store.used_mb) == (2, 0, 0)


def test_store_shares_equal_content_and_takes_arrays_and_bytes(tmp_path):
    (clip,) = files(tmp_path, 1)
    store = ClipStore()
    data = (tmp_path / "0.wav").read_bytes()
    assert store.key(clip) == store.key(Clip(data=data)) == store.key(clip)
    key = store.key(Clip(array=TONE, sampling_rate=RATE))
    np.testing.assert_array_equal(store.waveform(key)[0], TONE)
    with pytest.raises(KeyError, match="name it first"):
        store.waveform("0" * 64)


def test_store_notices_a_changed_file(tmp_path):
    (clip,) = files(tmp_path, 1)
    store = ClipStore(memory_mb=0)
    key = store.key(clip)
    soundfile.write(clip.path, TONE, RATE)
    with pytest.raises(AudioError, match="changed"):
        store.waveform(key)
    with pytest.raises(AudioError, match="changed"):
        store.key(clip)
    (tmp_path / "0.wav").unlink()
    with pytest.raises(AudioError, match=r"0\.wav"):
        store.key(clip)


def test_store_from_many_threads(tmp_path):
    clips = files(tmp_path, 6, samples=2**12)
    store = ClipStore(memory_mb=3 * 2**14 / 2**20)
    expected = {store.key(clip): decode(clip)[0] for clip in clips}
    wrong = []

    def work(seed):
        keys = np.random.default_rng(seed).choice(list(expected), 200)
        wrong.extend(key for key in keys if not np.array_equal(store.waveform(str(key))[0], expected[str(key)]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store) == 3
    assert store.hits + store.decoded == 800
    assert store.used_mb == 3 * 2**14 / 2**20
