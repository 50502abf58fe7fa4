"""The mel at 100 Hz, against a sum written out, and the way back."""

import numpy as np
import pytest
import torch

from covo_rl.models.covo_audio.token2wav.mel import griffin_lim, log_mel, mel_bank


def tone(hertz: float, seconds: float = 0.5) -> torch.Tensor:
    time = torch.arange(int(24000 * seconds)) / 24000
    return sum(torch.sin(2 * torch.pi * hertz * k * time) / k for k in range(1, int(11000 / hertz)))[None] / 8  # type: ignore[return-value]


def test_a_frame_is_the_sum_that_the_definition_says():
    wave = torch.randn(1, 4800, generator=torch.Generator().manual_seed(0))
    frame = 7
    centre = 240 * frame + 120
    n = np.arange(1024)
    piece = wave[0, centre - 512 : centre + 512].numpy() * (0.5 - 0.5 * np.cos(2 * np.pi * n / 1024))
    magnitude = np.abs(np.exp(-2j * np.pi * np.outer(np.arange(513), n) / 1024) @ piece)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 12000 / 700), 66) / 2595) - 1)
    hertz = np.arange(513) * 24000 / 1024
    for channel in (0, 20, 63):
        low, middle, high = edges[channel : channel + 3]
        triangle = np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)).clip(0)
        expected = np.log(max(triangle @ magnitude, 1e-4))
        assert log_mel(wave)[0, frame, channel].item() == pytest.approx(expected, abs=1e-4)


def test_frames_are_samples_over_240_and_silence_is_the_floor():
    for codes in (1, 2, 5):
        mel = log_mel(torch.zeros(2, 960 * codes))
        assert mel.shape == (2, 4 * codes, 64)
        assert mel.eq(np.float32(np.log(1e-4))).all()
    with pytest.raises(ValueError, match="392 samples; the mel needs more than 392"):
        log_mel(torch.zeros(1, 392))


def test_mel_keeps_dtype_and_gradient():
    wave = tone(150).double().requires_grad_()
    log_mel(wave).sum().backward()
    assert wave.grad is not None and wave.grad.isfinite().all()
    assert log_mel(wave).dtype == torch.float64
    assert mel_bank().shape == (64, 513)


def strongest_period(wave_T: torch.Tensor) -> float:
    """F0 in Hz by the autocorrelation's largest value between 60 and 400 Hz, its lag refined by a parabola."""
    spectrum = torch.fft.rfft(wave_T, 2 * len(wave_T))
    lags = torch.fft.irfft(spectrum.abs() ** 2)[: len(wave_T)] / torch.arange(len(wave_T), 0, -1)
    lag = int(lags[60:400].argmax()) + 60
    before, at, after = lags[lag - 1 : lag + 2].tolist()
    return 24000 / (lag + (before - after) / (2 * (before - 2 * at + after)))


@pytest.mark.parametrize("hertz", [110.0, 163.0, 220.0])
def test_griffin_lim_keeps_the_pitch(hertz):
    wave = griffin_lim(log_mel(tone(hertz)))
    assert wave.shape == (1, 1, 12000)
    assert abs(12 * np.log2(strongest_period(wave[0, 0, 1200:-1200]) / hertz)) < 0.3


def test_griffin_lim_is_seeded_and_rows_are_independent():
    mel = log_mel(torch.cat([tone(110), tone(220)]))
    both = griffin_lim(mel, iterations=4)
    assert torch.equal(both[1:], griffin_lim(mel[1:], iterations=4))
    assert not torch.equal(both, griffin_lim(mel, iterations=4, seed=1))
