"""A learned vocoder that knows the pitch: sines at multiples of F0 and noise, each through a filter a net predicts.

Harmonics plus filtered noise after DDSP (Engel et al., arXiv 2001.04643); a source driven by F0 and shaped by a net after
the neural source-filter model (Wang et al., arXiv 1904.12088). The filters act on short-time spectra. Whatever the net
does, the harmonics lie where the F0 channel says, so a codec that carries F0 keeps it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

RATE, HOP, FFT, MELS = 24_000, 240, 1024, 64
#: channels of a `mel_pitch` latent after the mel: log2 of F0 in Hz (joined through unvoiced frames), voiced or not
F0_CHANNEL, VOICED_CHANNEL = MELS, MELS + 1
_HIGHEST = 11_500  # Hz, of a harmonic
_PERIOD = 1000  # frames after which the noise repeats
_PAD = (FFT - HOP) // 2  # frame k is centred on sample 240k + 120, as in the mel


class HarmonicVocoder(nn.Module):
    """(B, 66, Z) `mel_pitch` latents, 100 Hz -> waves (B, 1, 240 Z), 24 kHz. Looks 5 frames ahead and 20 back.

    What repeats or adds up over a whole clip is told by `start` where a clip is made in pieces: noise and phase.
    """

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(VOICED_CHANNEL + 1, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 5) for _ in range(layers))
        self.filters = nn.Conv1d(width, 2 * (FFT // 2 + 1), 1)
        nn.init.zeros_(self.filters.weight)
        nn.init.constant_(self.filters.bias, -5.0)  # type: ignore[arg-type]  # near the level of a mel's bin
        # mel bins -> FFT bins, a straight line between centres
        self.register_buffer("spread", _spread(), persistent=False)
        noise = torch.randn(_PERIOD * HOP, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise, persistent=False)
        self.register_buffer("window", torch.hann_window(FFT), persistent=False)

    def forward(self, latents_BEZ: Tensor, start: tuple[int, Tensor] | None = None) -> Tensor:
        """`start`: number of the first frame, and the cycles (B,) that `cycles` counted before it."""
        mel, f0, voiced = latents_BEZ.split((MELS, 1, 1), 1)
        features = torch.cat([(mel + 5) / 2.5, (f0 - 7.3) * 2, voiced], 1)
        hidden = self.conv_in(features)
        for layer in self.layers:
            hidden = hidden + layer(functional.pad(functional.gelu(hidden), (4, 0)))
        log_gains = self.filters(functional.gelu(hidden)).float()
        base = (self.spread.float() @ mel.float()).repeat(1, 2, 1)
        gains = (log_gains + base).clamp(max=10).exp().chunk(2, 1)  # of harmonics, of noise: (B, F, Z)
        frame, before = start if start is not None else (0, None)
        sources = self._harmonics(latents_BEZ.float(), before), self._noise(frame, latents_BEZ.shape[2])
        spectrum = sum(gain * self._spectrum(source) for gain, source in zip(gains, sources, strict=True))
        return self._wave(spectrum)[:, None].to(latents_BEZ.dtype)  # type: ignore[arg-type]

    def cycles(self, latents_BEZ: Tensor) -> Tensor:
        """Cycles (B,) of F0 in these frames, modulo 1."""
        return _phase(latents_BEZ[:, F0_CHANNEL].float())[1]

    def _harmonics(self, latents_BEZ: Tensor, before: Tensor | None) -> Tensor:
        """cos(x) + cos(2x) + ... of equal amplitude up to _HIGHEST, in closed form; silent without voice. (B, T)"""
        log_f0_BZ, voiced_BZ = latents_BEZ[:, F0_CHANNEL], (latents_BEZ[:, VOICED_CHANNEL] > 0.5).float()
        cycles_BT, _ = _phase(log_f0_BZ)
        if before is not None:
            cycles_BT = cycles_BT + before[:, None]
        x = 2 * math.pi * (cycles_BT - cycles_BT.round())
        count = _HIGHEST / _samples(_hertz(log_f0_BZ))
        whole, half = count.floor(), (x / 2).sin()
        small = half.abs() < 1e-5
        sines = torch.where(small, whole, ((whole + 0.5) * x).sin() / torch.where(small, 1, 2 * half) - 0.5)
        # the highest harmonic fades in, lest it clicks where F0 glides
        return _samples(voiced_BZ) * (sines + (count - whole) * ((whole + 1) * x).cos())

    def _noise(self, frame: int, frames: int) -> Tensor:
        index = torch.arange(frames * HOP, device=self.noise.device) + frame % _PERIOD * HOP
        return self.noise.float()[index % len(self.noise)][None]

    def _spectrum(self, wave_BT: Tensor) -> Tensor:
        padded = functional.pad(wave_BT, (_PAD, _PAD))
        return torch.stft(padded, FFT, HOP, window=self.window.float(), center=False, return_complex=True)

    def _wave(self, spectrum_BFZ: Tensor) -> Tensor:
        """Overlap-add of windowed frames, over the sum of squared windows."""
        window = self.window.float()
        frames_BNZ = torch.fft.irfft(spectrum_BFZ, dim=1) * window[:, None]
        squares_1NZ = (window**2)[None, :, None].expand(1, FFT, spectrum_BFZ.shape[2])
        length = (spectrum_BFZ.shape[2] - 1) * HOP + FFT
        waves, weights = (
            functional.fold(part, (1, length), (1, FFT), stride=(1, HOP))[:, 0, 0, _PAD : length - _PAD]
            for part in (frames_BNZ, squares_1NZ)
        )
        return waves / weights


def _hertz(log_f0_BZ: Tensor) -> Tensor:
    return 2 ** log_f0_BZ.clamp(math.log2(40), math.log2(1000))


def _phase(log_f0_BZ: Tensor) -> tuple[Tensor, Tensor]:
    """Cycles since the start at every sample (B, T), each frame's own sum kept small; those of the whole, modulo 1."""
    step_BZN = (_samples(_hertz(log_f0_BZ)) / RATE).unflatten(1, (-1, HOP))
    within_BZN = step_BZN.cumsum(2)
    total_BZ = within_BZN[..., -1]
    total_BZ = (total_BZ - total_BZ.round()).cumsum(1)
    before_BZ = functional.pad(total_BZ, (1, -1))
    return (before_BZ[..., None] + within_BZN).flatten(1), total_BZ[:, -1] % 1


def _samples(frames_BZ: Tensor) -> Tensor:
    """Values at frame centres -> at every sample, on straight lines; the ends are held."""
    return functional.interpolate(frames_BZ[:, None], scale_factor=HOP, mode="linear")[:, 0]


def _spread() -> Tensor:
    """(FFT bins, mel bins): each FFT bin between its two nearest mel centres."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    mels = 2595 * torch.log10(1 + torch.arange(FFT // 2 + 1) * RATE / FFT / 700)
    place = (mels / top * (MELS + 1) - 1).clamp(0, MELS - 1)[:, None]
    return (1 - (place - torch.arange(MELS)).abs()).clamp(min=0)
