"""What tells a vocoder's waves from recordings, in training only: by periods, and by spectra at several resolutions.

Multi-period discriminators are those of HiFi-GAN (arXiv 2010.05646), multi-resolution ones those of UnivNet (arXiv
2106.07889); BigVGAN (arXiv 2206.04658) has both.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

PERIODS = (2, 3, 5, 7, 11)
#: FFT, hop, window
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
SLOPE = 0.1


def _conv(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))


class _Discriminator(nn.Module):
    """Layers with leaky ReLUs between them; returns every layer's map, the verdict last."""

    def __init__(self, layers: list[nn.Module], verdict: nn.Module) -> None:
        super().__init__()
        self.layers, self.verdict = nn.ModuleList(layers), verdict

    def picture(self, wave_BT: Tensor) -> Tensor:
        """The wave as (B, 1, height, width)."""
        raise NotImplementedError

    def forward(self, wave_BT: Tensor) -> list[Tensor]:
        x, maps = self.picture(wave_BT), []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            maps.append(x)
        return [*maps, self.verdict(x)]


class PeriodDiscriminator(_Discriminator):
    """Looks at every `period`-th sample."""

    def __init__(self, period: int, width: int = 32) -> None:
        self.period = period
        sizes = (1, width, 4 * width, 16 * width, 32 * width)
        layers = [_conv(a, b, (5, 1), (3, 1)) for a, b in pairwise(sizes)]
        super().__init__([*layers, _conv(32 * width, 32 * width, (5, 1))], _conv(32 * width, 1, (3, 1)))

    def picture(self, wave_BT: Tensor) -> Tensor:
        padded = F.pad(wave_BT[:, None], (0, -wave_BT.shape[1] % self.period), mode="reflect")
        return padded.unflatten(-1, (-1, self.period))


class ResolutionDiscriminator(_Discriminator):
    """Looks at magnitudes of one resolution."""

    def __init__(self, resolution: tuple[int, int, int], width: int = 32) -> None:
        self.resolution = resolution
        layers = [_conv(1, width, (3, 9)), *(_conv(width, width, (3, 9), (1, 2)) for _ in range(3))]
        super().__init__([*layers, _conv(width, width, (3, 3))], _conv(width, 1, (3, 3)))

    def picture(self, wave_BT: Tensor) -> Tensor:
        size, hop, length = self.resolution
        margin = (size - hop) // 2
        padded = F.pad(wave_BT[:, None], (margin, margin), mode="reflect")[:, 0]
        window = torch.hann_window(length, dtype=wave_BT.dtype, device=wave_BT.device)
        spectrum = torch.stft(padded, size, hop, length, window=window, center=False, return_complex=True)
        return spectrum.abs()[:, None]


class Discriminators(nn.Module):
    """All of them: wave (B, T) -> the maps of each, its verdict last. `width` 32 is BigVGAN's."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.each = nn.ModuleList([
            *(PeriodDiscriminator(period, width) for period in PERIODS),
            *(ResolutionDiscriminator(resolution, width) for resolution in RESOLUTIONS),
        ])  # fmt: skip

    def forward(self, wave_BT: Tensor) -> list[list[Tensor]]:
        return [discriminator(wave_BT) for discriminator in self.each]
