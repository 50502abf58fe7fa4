"""What trains a decoder: flow matching of latents; a vocoder's spectra, and its game with discriminators.

Every loss is float32 arithmetic on tensors of any float dtype, and no synchronisation with the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_rl.models.covo_audio.token2wav.configuration import CODE_FRAMES, FlowConfig
from covo_rl.models.covo_audio.token2wav.flow import FlowField
from covo_rl.models.covo_audio.token2wav.mel import log_mel

#: windows of the multi-resolution loss; hops are a quarter of them
WINDOWS = (2048, 1024, 512, 256, 128)
SHORTEST_SPAN = 10  # frames that are filled in at least
FLOOR = 1e-3


@dataclass(frozen=True)
class FlowDraw:
    """The chance of one loss: times (B,), noise (B, Z, E), rows that see their codes (B,), frames to fill in (B, Z)."""

    t_B: Tensor
    noise_BZE: Tensor
    seen_B: Tensor
    span_BZ: Tensor


def draw_flow(config: FlowConfig, mask_BZ: Tensor, generator: torch.Generator | None = None) -> FlowDraw:
    """t of U(0, 1), noise of N(0, 1); codes are hidden with `cfg_dropout`; the span is a tail of each row's real
    frames, a share of U(bert_mask_rate0, bert_mask_rate1) of them and at least 10. Drawn on the CPU: alike everywhere.
    """
    size, device = tuple(mask_BZ.shape), mask_BZ.device
    t, keep, share = torch.rand(3, size[0], generator=generator).to(device)
    noise = torch.randn(*size, config.z_dim, generator=generator).to(device)
    share = config.bert_mask_rate0 + (config.bert_mask_rate1 - config.bert_mask_rate0) * share
    length_B = mask_BZ.sum(dim=1)
    first_B = torch.minimum((length_B * (1 - share)).floor(), length_B - SHORTEST_SPAN)
    span = (torch.arange(size[1], device=device) >= first_B[:, None]) & mask_BZ
    return FlowDraw(t, noise, keep >= config.cfg_dropout, span)


def flow_loss(
    field: FlowField, latents_BZE: Tensor, codes_BL: Tensor, speaker_BS: Tensor, mask_BZ: Tensor, draw: FlowDraw,
    total: Tensor | float | None = None, pitch_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """Conditional flow matching (Lipman et al., arXiv 2210.02747) on optimal-transport paths, over the span's frames:

    x_t = t x1 + (1 - (1-s) t) x0, and the field shall say x1 - (1-s) x0 given codes, speaker and x1 outside the span.

    Args:
        latents_BZE: x1, normalised; codes_BL has Z / 4 of them; mask_BZ is True at real frames.
        total: what the sum is divided by, where an update has several shares; default: the frames of the span.
        pitch_weight: of the numbers behind the mel bins.
    """
    config, span_BZ1 = field.config, draw.span_BZ[..., None]
    x1, x0, t_B11 = latents_BZE, draw.noise_BZE.to(latents_BZE), draw.t_B[:, None, None].to(latents_BZE)
    drift = x1 - (1 - config.sigma) * x0
    T_BZW = field.condition(codes_BL, mask_BZ[:, ::CODE_FRAMES]) * draw.seen_B[:, None, None]
    velocity = field(x0 + t_B11 * drift, draw.t_B.to(x1), T_BZW, x1.masked_fill(span_BZ1, 0), speaker_BS, mask_BZ)
    wide = torch.promote_types(x1.dtype, torch.float32)
    squares_BZE = (velocity.to(wide) - drift.to(wide)).square()
    if pitch_weight != 1:
        weights = torch.ones(x1.shape[-1], device=x1.device)
        weights[64:] = pitch_weight
        squares_BZE = squares_BZE * weights
    count = span_BZ1.sum() if total is None else torch.as_tensor(total, device=x1.device)
    return squares_BZE.mean(dim=-1, keepdim=True).masked_fill(~span_BZ1, 0).sum() / count.clamp(min=1)


def spectral_loss(heard_BT: Tensor, true_BT: Tensor) -> Tensor:
    """Mean over WINDOWS of spectral convergence and L1 of ln(|S| + 1e-3) (Yamamoto et al., arXiv 1910.11480)."""
    losses = []
    for size in WINDOWS:
        window = torch.hann_window(size, dtype=true_BT.dtype, device=true_BT.device)
        heard, true = (
            torch.stft(wave, size, size // 4, window=window, return_complex=True).abs() for wave in (heard_BT, true_BT)
        )
        convergence = (heard - true).norm() / true.norm().clamp(min=FLOOR)
        losses.append(convergence + ((heard + FLOOR).log() - (true + FLOOR).log()).abs().mean())
    return torch.stack(losses).mean()


# -- adversarial: LS-GAN (arXiv 1611.04076) and feature matching, as HiFi-GAN (2010.05646) and BigVGAN (2206.04658)

#: one discriminator's maps, the last of them its verdict
Maps = Sequence[Tensor]


def discriminator_loss(true: Sequence[Maps], heard: Sequence[Maps]) -> Tensor:
    """Verdicts on recordings shall be 1, on the vocoder's waves 0."""
    pairs = zip(true, heard, strict=True)
    return torch.stack([(1 - a[-1]).square().mean() + b[-1].square().mean() for a, b in pairs]).sum()


def vocoder_loss(
    true: Sequence[Maps], heard: Sequence[Maps], true_BT: Tensor, heard_BT: Tensor
) -> dict[str, Tensor]:  # fmt: skip
    """Verdicts shall be 1; 2 x L1 of all maps before them; 45 x L1 of log-mels."""
    adversarial = torch.stack([(1 - maps[-1]).square().mean() for maps in heard]).sum()
    matching = torch.stack([
        F.l1_loss(b, a.detach()) for true_maps, heard_maps in zip(true, heard, strict=True)
        for a, b in zip(true_maps[:-1], heard_maps[:-1], strict=True)
    ]).sum()  # fmt: skip
    mel = F.l1_loss(log_mel(heard_BT), log_mel(true_BT))
    return {"adversarial": adversarial, "matching": 2 * matching, "mel": 45 * mel}
