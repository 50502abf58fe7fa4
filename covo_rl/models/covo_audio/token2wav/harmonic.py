"""A learned vocoder that knows the pitch: sines at multiples of F0 and noise, through filters that a net predicts.

Harmonics plus filtered noise are DDSP (Engel et al., arXiv 2001.04643), a source driven by F0 and shaped by a net the
neural source-filter model (Wang et al., arXiv 1904.12088); here the filters act on short-time spectra. Whatever the net
does, the harmonics lie where the F0 channel says: what carries F0 keeps it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from covo_rl.models.covo_audio.token2wav.mel import HOP, MARGIN, MEL_BINS, N_FFT, RATE, mel_bank, overlap_add, stft

#: channels of `mel_pitch` behind the mel: log2 of F0 in Hz, joined by lines through unvoiced frames; voiced (1) or not
F0_CHANNEL, VOICED_CHANNEL, MEL_PITCH = MEL_BINS, MEL_BINS + 1, MEL_BINS + 2
LOWEST_F0, HIGHEST_F0 = 40, 1000  # Hz
HIGHEST_HARMONIC = 11_500  # Hz
NOISE_FRAMES = 1000  # after which the noise repeats


class State(NamedTuple):
    """Of a wave made in pieces: how many frames are before; F0 and phase at the centre of the last of them."""

    frames: int
    hz_B1: torch.Tensor
    cycles_B1: torch.Tensor


class HarmonicVocoder(nn.Module):
    """`mel_pitch` latents (B, 66, Z), not normalised -> wave (B, 1, 240 Z)."""

    past_frames, future_frames = 24, 6

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(MEL_PITCH, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 5) for _ in range(layers))
        self.filters = nn.Conv1d(width, 2 * (N_FFT // 2 + 1), 1)
        nn.init.zeros_(self.filters.weight)
        bias = self.filters.bias
        assert bias is not None
        nn.init.constant_(bias, -5.0)  # about the level of one FFT bin in a mel bin

    def forward(self, latents_BEZ: torch.Tensor, state: State | None = None) -> torch.Tensor:
        wide = torch.promote_types(latents_BEZ.dtype, torch.float32)  # bfloat16 has steps of half a semitone
        latents_BEZ = latents_BEZ.to(wide)
        mel, f0, voiced = latents_BEZ.split((MEL_BINS, 1, 1), dim=1)
        features = torch.cat([(mel + 5) / 2.5, (f0 - 7.3) * 2, voiced], dim=1)
        hidden = self.conv_in(features.to(self.conv_in.weight))
        for layer in self.layers:
            hidden = hidden + layer(F.pad(F.gelu(hidden), (4, 0)))
        spread = mel_bank().to(latents_BEZ.device, wide).T  # of mel bins to FFT bins: a line between their centres
        base = (spread / spread.sum(dim=1, keepdim=True).clamp(min=1e-3)) @ mel
        gains = [(part + base).clamp(max=10).exp() for part in self.filters(F.gelu(hidden)).to(wide).chunk(2, dim=1)]
        frames = latents_BEZ.shape[-1]
        sources = _harmonics(latents_BEZ, state), _noise(state.frames if state else 0, frames).to(gains[0])
        spectrum = sum(gain * stft(F.pad(wave, (MARGIN, MARGIN))) for gain, wave in zip(gains, sources, strict=True))
        return overlap_add(spectrum)[:, None, MARGIN:-MARGIN]  # pyright: ignore[reportArgumentType]

    def carry(self, dropped_BEZ: torch.Tensor, spoken_BT: torch.Tensor, state: State | None) -> State | None:
        """The state behind `dropped_BEZ`: phase and noise go on in the next piece as if there were one."""
        if not dropped_BEZ.shape[-1]:
            return state
        hz_BZ = _hertz(dropped_BEZ)
        cycles_BZ = _cycles(hz_BZ, state)
        frames = (state.frames if state else 0) + dropped_BEZ.shape[-1]
        return State(frames, hz_BZ[:, -1:], cycles_BZ[:, -1:] % 1)


def _hertz(latents_BEZ: torch.Tensor) -> torch.Tensor:
    return 2 ** latents_BEZ[:, F0_CHANNEL].clamp(math.log2(LOWEST_F0), math.log2(HIGHEST_F0))


def _cycles(hz_BZ: torch.Tensor, state: State | None) -> torch.Tensor:
    """Phase at the centres of frames, in cycles, of an F0 on straight lines between them. Whole cycles are left out:
    the sum stays small, and float32 exact enough for the hundredth harmonic."""
    if state is None:
        steps = F.pad((hz_BZ[:, :-1] + hz_BZ[:, 1:]) / 2 * HOP / RATE, (1, 0))
    else:
        hz = torch.cat([state.hz_B1, hz_BZ], dim=1)
        steps = (hz[:, :-1] + hz[:, 1:]) / 2 * HOP / RATE
    return (steps - steps.round()).cumsum(dim=1) + (0 if state is None else state.cycles_B1)


def _harmonics(latents_BEZ: torch.Tensor, state: State | None) -> torch.Tensor:
    """cos x + cos 2x + ... up to HIGHEST_HARMONIC, in closed form; silent where unvoiced. (B, 240 Z)"""
    hz_BZ = _hertz(latents_BEZ)
    hz_BT, half = _samples(hz_BZ), HOP // 2
    within_BZN = F.pad(hz_BT / RATE, (half, half)).unflatten(1, (-1, HOP)).cumsum(dim=2)  # from centre to centre
    centre_BZ = _cycles(hz_BZ, state)
    begin_BZ = torch.cat([centre_BZ[:, :1] - within_BZN[:, 0, -1:], centre_BZ], dim=1)
    cycles_BT = (begin_BZ[..., None] + within_BZN).flatten(1)[:, half:-half]
    x_BT = 2 * math.pi * (cycles_BT - cycles_BT.round())
    count = HIGHEST_HARMONIC / hz_BT
    whole, sine = count.floor(), (x_BT / 2).sin()
    small = sine.abs() < 1e-5
    waves_BT = torch.where(small, whole, ((whole + 0.5) * x_BT).sin() / torch.where(small, 1, 2 * sine) - 0.5)
    waves_BT = waves_BT + (count - whole) * ((whole + 1) * x_BT).cos()  # fades in, lest it clicks where F0 glides
    return waves_BT * _samples((latents_BEZ[:, VOICED_CHANNEL] > 0.5).to(hz_BT))


def _noise(first: int, frames: int) -> torch.Tensor:
    """White noise (1, 240 frames); a sample's depends on its place in the whole wave alone."""
    noise = torch.randn(NOISE_FRAMES, HOP, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise[torch.arange(first, first + frames) % NOISE_FRAMES].reshape(1, -1)


def _samples(frames_BZ: torch.Tensor) -> torch.Tensor:
    """Values at the centres of frames -> at every sample, on straight lines; the ends are held."""
    return F.interpolate(frames_BZ[:, None], scale_factor=HOP, mode="linear")[:, 0]
