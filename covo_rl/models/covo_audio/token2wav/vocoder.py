"""Latents at 100 Hz to a wave at 24 kHz: BigVGAN (arXiv 2206.04658), made causal but for 6 frames.

Parameters have the published names, weight norm included: `weight_g`, `weight_v`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from covo_rl.models.covo_audio.token2wav.configuration import VocoderConfig
from covo_rl.models.covo_audio.token2wav.mel import MEL_BINS, griffin_lim

TAPS = 12


@lru_cache(maxsize=1)
def half_band_filter() -> torch.Tensor:
    """0.5 sinc(0.5 n) under a Kaiser window, sum 1, (1, 1, 12) float32: passes the lower half of the band."""
    attenuation = 2.285 * (TAPS // 2 - 1) * math.pi * 1.2 + 7.95
    window = torch.kaiser_window(TAPS, False, 0.1102 * (attenuation - 8.7), dtype=torch.float64, device="cpu")
    taps = torch.sinc(0.5 * torch.arange(0.5 - TAPS / 2, TAPS / 2, dtype=torch.float64, device="cpu")) * window
    return (taps / taps.sum()).float().reshape(1, 1, TAPS)


class _Filtered(nn.Module):
    filter: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", half_band_filter().clone())


class UpSample(_Filtered):
    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        channels = x_BCT.shape[1]
        padded = F.pad(x_BCT, (5, 5), mode="replicate")
        taps = self.filter.expand(channels, -1, -1)
        return 2 * F.conv_transpose1d(padded, taps, stride=2, groups=channels)[..., 15:-15]


class _DownSample(nn.Module):
    """Twice as slow; `lowpass` only gives its filter the published name."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = _Filtered()

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        channels = x_BCT.shape[1]
        padded = F.pad(x_BCT, (5, 6), mode="replicate")
        return F.conv1d(padded, self.lowpass.filter.expand(channels, -1, -1), stride=2, groups=channels)


class SnakeBeta(nn.Module):
    """x + sin^2(x e^alpha) / e^beta, per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x_BCT + (x_BCT * alpha).sin() ** 2 / (beta + 1e-9)


class Activation(nn.Module):
    """SnakeBeta at twice the rate, so that its overtones do not fold back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample, self.act, self.downsample = UpSample(), SnakeBeta(channels), _DownSample()

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return self.downsample(self.act(self.upsample(x_BCT)))


class NormedConv(nn.Module):
    """A convolution of weight g v / |v|, the norm over all axes but the first (arXiv 1602.07868).

    `rate` 0: Conv1d; `causal`: it pads left only, `kernel` // 2 on both sides otherwise. `rate` > 0: a transposed
    one of that stride, whose last `rate` samples are dropped, so that it is causal too.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, dilation: int = 1, rate: int = 0, causal: bool = True
    ) -> None:
        super().__init__()
        plain = nn.ConvTranspose1d(inputs, outputs, kernel) if rate else nn.Conv1d(inputs, outputs, kernel)
        self.weight_v = plain.weight
        self.weight_g = nn.Parameter(plain.weight.detach().norm(dim=(1, 2), keepdim=True))
        assert plain.bias is not None
        self.bias = plain.bias
        self.dilation, self.rate, span = dilation, rate, dilation * (kernel - 1)
        self.padding = (span, 0) if causal else (span // 2, span // 2)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(1, 2), keepdim=True))
        if self.rate:
            return F.conv_transpose1d(x_BCT, weight, self.bias, self.rate)[..., : -self.rate]
        return F.conv1d(F.pad(x_BCT, self.padding), weight, self.bias, dilation=self.dilation)


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(NormedConv(channels, channels, kernel, dilation=d) for d in dilations)
        self.convs2 = nn.ModuleList(NormedConv(channels, channels, kernel) for _ in dilations)
        self.activations = nn.ModuleList(Activation(channels) for _ in range(2 * len(dilations)))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        for i, (first, second) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            x_BCT = x_BCT + second(self.activations[2 * i + 1](first(self.activations[2 * i](x_BCT))))
        return x_BCT


class Vocoder(nn.Module):
    """Latents (B, E, Z) -> wave (B, 1, 240 Z) within -1 and 1.

    A frame's samples depend on `past_frames` before it and `future_frames` after it, and on no other state. What more
    there is in float64: past 40 would leave 1e-9, 24 2e-5; a future of 6 leaves 5e-13, 3 1e-4.
    """

    past_frames, future_frames = 48, 6

    def __init__(self, config: VocoderConfig, latent: int) -> None:
        super().__init__()
        width = config.upsample_initial_channel
        self.conv_pre = NormedConv(latent, width, 7, causal=False)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            self.ups.append(nn.ModuleList([NormedConv(width, width // 2, kernel, rate=rate)]))
            width //= 2
            shapes = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
            self.resblocks.extend(ResBlock(width, size, dilations) for size, dilations in shapes)
        self.activation_post, self.conv_post = Activation(width), NormedConv(width, 1, 7)

    def forward(self, latents_BEZ: torch.Tensor, state: None = None) -> torch.Tensor:
        x_BCT = self.conv_pre(latents_BEZ.to(self.conv_pre.bias))
        kinds = len(self.resblocks) // len(self.ups)
        for i, stage in enumerate(self.ups):
            x_BCT = stage[0](x_BCT)  # pyright: ignore[reportIndexIssue] (published name: ups.0.0)
            blocks = self.resblocks[kinds * i : kinds * (i + 1)]
            x_BCT = sum((block(x_BCT) for block in blocks), start=torch.zeros_like(x_BCT)) / kinds
        return self.conv_post(self.activation_post(x_BCT)).tanh()

    def carry(self, dropped_BEZ: torch.Tensor, spoken_BT: torch.Tensor, state: None) -> None:
        return None


class GriffinLim(nn.Module):
    """Log-mel latents (B, 64, Z), or with pitch (B, 66, Z) -> wave (B, 1, 240 Z).

    Its state is the wave that has gone out, which it continues.
    """

    past_frames, future_frames = 8, 6

    def forward(self, latents_BEZ: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        return griffin_lim(latents_BEZ[:, :MEL_BINS].mT, head_BT=state)

    def carry(self, dropped_BEZ: torch.Tensor, spoken_BT: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        return spoken_BT
