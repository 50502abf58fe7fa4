"""The audio front end: resampler, log-mel, token counts, and input that cannot be used."""

import math

import numpy as np
import pytest
import torch
from covo_reference import FOLDER, read_json

from covo_rl.models import waveform
from covo_rl.models.covo_audio import CovoAudioFeatureExtractor
from covo_rl.models.covo_audio.features import mel_filters
from covo_rl.models.waveform import mono_float, resampling_kernel, sinc_resample

EXTRACTOR = CovoAudioFeatureExtractor()
SHORT = CovoAudioFeatureExtractor(segment_frames=300)  # three-second segments


def tone(seconds, rate=24000, hz=440.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [48000, 44100, 16000, 8000])
def test_resampling_to_24_khz_equals_the_reference(rate):
    with np.load(FOLDER / "resample.npz") as data:
        given, want = data[f"in_{rate}"], data[f"functional_{rate}_to_24000"]
    got = sinc_resample(torch.from_numpy(given), rate, 24000)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_resampling_24_to_16_khz_equals_the_reference():
    with np.load(FOLDER / "resample.npz") as data:
        kernel = resampling_kernel(3, 2, torch.float64)
        np.testing.assert_array_equal(kernel, data["kernel_24000_to_16000"])
        got = sinc_resample(torch.from_numpy(data["in_24000"]), 24000, 16000, kernel_dtype=torch.float64)
        np.testing.assert_allclose(got, data["transform_24000_to_16000"], atol=1e-6)


@pytest.mark.parametrize("rate, new_rate", [(24000, 16000), (44100, 24000), (8000, 24000)])
def test_gathered_taps_equal_the_convolution(monkeypatch, rate, new_rate):
    wave = torch.from_numpy(tone(0.05, rate))
    want = sinc_resample(wave, rate, new_rate, kernel_dtype=torch.float64)
    monkeypatch.setattr(waveform, "MAX_KERNEL_NUMEL", 0)
    monkeypatch.setattr(waveform, "resampling_kernel", lambda *_: pytest.fail("a kernel was built"))
    got = sinc_resample(wave, rate, new_rate)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 88200, 96000, 192000, 44101])
def test_a_tone_keeps_its_length_and_level_at_any_rate(rate):
    got = sinc_resample(torch.from_numpy(tone(0.5, rate)), rate, 24000).numpy()
    assert len(got) == math.ceil(24000 * round(0.5 * rate) / rate)
    want = tone(0.5)
    np.testing.assert_allclose(got[200:11800], want[200:11800], atol=2e-3)


def test_kernels_are_built_once():
    wave = torch.from_numpy(tone(0.1))
    sinc_resample(wave, 24000, 16000)
    before = resampling_kernel.cache_info()
    for _ in range(5):
        sinc_resample(wave, 24000, 16000)
    after = resampling_kernel.cache_info()
    assert after.misses == before.misses and after.hits == before.hits + 5


@pytest.mark.parametrize("bad", [0, -8000, 0.5])
def test_a_rate_that_is_no_rate_is_refused(bad):
    with pytest.raises(ValueError, match="not a positive whole number of Hz"):
        sinc_resample(torch.zeros(10), bad, 24000)


def test_token_counts_equal_the_table():
    for row in read_json("token_counts.json"):
        frames = EXTRACTOR.frame_counts(row["samples_24k"])
        assert [240 * f for f in frames] == row["segments"], row
        slots = EXTRACTOR.slot_counts(row["samples_24k"])
        assert sum(slots) == row["audio_tokens"], row
        assert all(count <= 188 for count in slots)


@pytest.mark.parametrize("seconds, slots", [(1, [7]), (3.2, [20]), (30, [188]), (41, [188, 69]), (60, [188, 187])])
def test_slots_are_the_first_rows_of_each_segment(seconds, slots):
    assert EXTRACTOR.slot_counts(round(seconds * 24000)) == slots


def test_a_three_second_clip_of_the_tiny_model_fills_19_slots():
    features, mask = SHORT.clip(tone(3), 24000)
    assert features.shape == (1, 128, 300) and mask.sum() == 19
    features, mask = SHORT.clip(tone(7), 24000)
    assert features.shape == (3, 128, 300) and mask.sum(1).tolist() == [19, 19, 6]  # 700 frames: 44 slots, not 45


def _plain_log_mel(samples, frames):
    """Every frame computed, padding included."""
    signal = sinc_resample(torch.as_tensor(samples), 24000, 16000, kernel_dtype=torch.float64)
    signal = torch.nn.functional.pad(signal, (0, frames * 160 - len(signal)))
    spectrum = torch.stft(signal, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1]
    logs = (mel_filters(400, 128, 16000) @ spectrum.abs() ** 2).clamp(min=1e-10).log10()
    return (torch.maximum(logs, logs.max() - 8) + 4) / 4


@pytest.mark.parametrize("seconds", [0.01, 0.02, 0.5, 2.97, 2.98, 2.99, 3.0])
def test_log_mel_equals_the_one_that_computes_the_padding_too(seconds):
    wave = tone(seconds)
    np.testing.assert_allclose(SHORT.log_mel(torch.from_numpy(wave)), _plain_log_mel(wave, 300), atol=1e-6)


def test_log_mel_agrees_with_the_whisper_extractor():
    from transformers import WhisperFeatureExtractor

    wave = torch.from_numpy(tone(1.0))
    at_16k = sinc_resample(wave, 24000, 16000, kernel_dtype=torch.float64).numpy()
    want = WhisperFeatureExtractor(feature_size=128, chunk_length=3)(at_16k, sampling_rate=16000)["input_features"][0]
    np.testing.assert_allclose(SHORT.log_mel(wave), want, atol=2e-4)


def test_segments_are_processed_independently():
    wave = tone(5)
    both = SHORT.clip(wave, 24000)[0]
    assert torch.equal(both[0], SHORT.clip(wave[:72000], 24000)[0][0])
    assert torch.equal(both[1], SHORT.clip(wave[72000:], 24000)[0][0])


def test_channels_and_sample_types():
    left, right = tone(0.1), tone(0.1, hz=880.0)
    mean = mono_float((left + right) / 2)
    for stereo in (np.stack([left, right], 1), np.stack([left, right]), torch.from_numpy(np.stack([left, right]))):
        assert torch.allclose(mono_float(stereo), mean, atol=1e-7)
    assert torch.equal(mono_float(left[:, None]), mono_float(left))
    for dtype, scale in ((np.int16, 2**15), (np.int32, 2**31)):
        pcm = (left.astype(np.float64) * scale).astype(dtype)
        assert torch.allclose(mono_float(pcm), mono_float(left), atol=1 / 2**14)
    assert mono_float(np.array([0, 128, 255], dtype=np.uint8)).tolist() == [-1.0, 0.0, 127 / 128]
    assert mono_float(np.array([-32768, 16384], dtype=">i2")).tolist() == [-1.0, 0.5]
    assert mono_float(left.astype(np.float64)).dtype == torch.float32


@pytest.mark.parametrize(
    "wave, message",
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((0, 2), np.float32), "no samples"),
        (np.full(2400, np.nan, np.float32), "2400 of 2400 samples are NaN or infinite"),
        (np.array([0.0, np.inf] * 1200, np.float32), "1200 of 2400 samples are NaN or infinite"),
        (np.zeros((2400, 3), np.float32), "3 channels"),
        (np.zeros((3, 2400), np.int16), "3 channels"),
        (np.zeros((2, 3, 2400), np.float32), r"shape \(2, 3, 2400\)"),
        (np.zeros(239, np.float32), "9.96 ms of audio; a clip needs at least 10 ms"),
        (np.zeros(10, np.complex64), "complex64"),
        (np.array(["a"]), "expected real samples"),
    ],
)
def test_audio_that_cannot_be_used_is_one_error_with_its_name(wave, message):
    with pytest.raises(ValueError, match=r"^dog\.wav: .*" + message):
        EXTRACTOR.clip(wave, 24000, "dog.wav")


def test_the_shortest_clip_works_at_every_rate():
    for rate in (8000, 16000, 24000, 44100, 48000, 192000):
        features, mask = SHORT.clip(tone(0.0101, rate), rate)
        assert mask.sum() == 1 and torch.isfinite(features).all()


def test_digital_silence_has_finite_features():
    features, _ = SHORT.clip(np.zeros(24000, np.float32), 24000)
    assert features.unique().tolist() == [-1.5]  # (log10(1e-10) + 4) / 4


def test_extractor_batches_and_saves(tmp_path):
    out = SHORT([tone(3), tone(7, 16000)], sampling_rate=[24000, 16000])
    assert out["segment_clips"].tolist() == [0, 1, 1, 1]
    SHORT.save_pretrained(tmp_path)
    again = CovoAudioFeatureExtractor.from_pretrained(tmp_path)
    assert torch.equal(again([tone(3)], sampling_rate=24000)["input_features"], out["input_features"][:1])
    with pytest.raises(ValueError, match="pass sampling_rate in Hz"):
        SHORT([tone(3)])
    with pytest.raises(ValueError, match="2 sampling rates for 1 clips"):
        SHORT([tone(3)], sampling_rate=[24000, 16000])
