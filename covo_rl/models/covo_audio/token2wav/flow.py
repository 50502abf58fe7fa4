"""The vector field v(x, t) that turns noise into latents, given codes, the latents before them and a speaker.

A transformer whose blocks are modulated by time and speaker (DiT, arXiv 2212.09748) in the form of Voicebox (arXiv
2306.15687). Parameters have the published names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from covo_rl.models.covo_audio.token2wav.configuration import CONV_GROUPS, FlowConfig, TransformerConfig

ROTARY_BASE = 50000.0
TIME_FREQUENCIES = 128
EPS = 1e-6


def rotary_frequencies(head: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """50000^(-2i / head), (head / 2) float32."""
    return ROTARY_BASE ** (-torch.arange(0, head, 2, dtype=torch.float32, device=device) / head)


class Rotary(nn.Module):
    """Holds the published tensor `inv_freq`; angles are computed in float32 whatever the model's dtype."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary_frequencies(head))


class Attention(nn.Module):
    """Every frame hears every other; `rotation` = (cosines, sines) (Z, head)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, width)
        self.rotary = Rotary(width // self.heads)

    def forward(
        self, u_BZW: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor | None
    ) -> torch.Tensor:
        query, key, value = (
            proj(u_BZW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(_rotate(query, rotation), _rotate(key, rotation), value, attn_mask=keys)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cosines, sines = rotation
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, u_BZW: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(u_BZW), approximate="tanh"))


def _modulate(u_BZW: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(u_BZW, u_BZW.shape[-1:], eps=EPS) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition; gates begin at zero."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn, self.ffn = Attention(config), FeedForward(config)
        self.modulation_layer = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(config.hidden_size, 6 * config.hidden_size)))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, u_BZW: torch.Tensor, c_B1W: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation_layer(c_B1W).chunk(6, dim=-1)
        attended = self.attn(_modulate(u_BZW, shift_a, scale_a), rotation, keys)
        u_BZW = u_BZW + gate_a * self.dropout(attended)
        return u_BZW + gate_f * self.dropout(self.ffn(_modulate(u_BZW, shift_f, scale_f)))


class ConvEmbed(nn.Module):
    """Positions by a grouped convolution over 31 frames; padding neither goes in nor comes out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 31, padding=15, groups=CONV_GROUPS)

    def forward(self, u_BZW: torch.Tensor, mask_BZ1: torch.Tensor | None) -> torch.Tensor:
        if mask_BZ1 is None:
            return F.gelu(self.conv(u_BZW.mT)).mT
        return F.gelu(self.conv((u_BZW * mask_BZ1).mT)).mT * mask_BZ1


class TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: torch.Tensor) -> torch.Tensor:
        """Times (B,) in [0, 1] -> (B, W)."""
        steps = torch.arange(TIME_FREQUENCIES, device=t_B.device)
        angles = t_B.float()[:, None] * torch.exp(-math.log(10000) * steps / TIME_FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.parameters()).dtype))


class OutputLayer(nn.Module):
    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(width, 2 * width)))
        self.linear = zeroed(nn.Linear(width, latent))

    def forward(self, u_BZW: torch.Tensor, c_B1W: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c_B1W).chunk(2, dim=-1)
        return self.linear(_modulate(u_BZW, shift, scale))


def zeroed(linear: nn.Linear) -> nn.Linear:
    """The same layer, whose weight and bias are zero."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class FlowField(nn.Module):
    """Codes, context, noisy latents, time and speaker -> velocity. W the width, E the latent's, S the speaker's."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        body, factor = config.transformer, config.upsample_factor
        width, latent = body.hidden_size, config.z_dim
        self.token_embedding = nn.Embedding(config.token_vocab_size, config.token_input_dim)
        self.token_proj = nn.Sequential(
            nn.Linear(config.token_input_dim, width),
            nn.ConvTranspose1d(width, width, 2 * factor, factor, padding=factor // 2),
        )
        self.cond_proj = nn.Linear(width + config.spkr_embed_dim, width)
        self.transformer_input_proj = nn.Linear(width + 2 * latent, width)
        self.time_embedder = TimeEmbedder(width)
        self.conv_embed = ConvEmbed(width)
        self.blocks = nn.ModuleList(Block(body) for _ in range(body.num_layers))
        self.output_layer = OutputLayer(width, latent)

    def embed(self, codes_BL: torch.Tensor) -> torch.Tensor:
        """Codes int64 (B, L) -> (B, L, token_input_dim); id -1 gives zeros."""
        return self.token_embedding(codes_BL.clamp(min=0)) * (codes_BL >= 0)[..., None]

    def condition(self, codes_BL: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Codes int64 (B, L) -> T (B, 4L, W). What `mask_BL` (bool) leaves out has no share in its neighbours."""
        hidden = self.token_proj[0](self.embed(codes_BL))
        if mask_BL is not None:
            hidden = hidden * mask_BL[..., None]
        return self.token_proj[1](hidden.mT).mT

    def forward(
        self, x_BZE: torch.Tensor, t_B: torch.Tensor, T_BZW: torch.Tensor, context_BZE: torch.Tensor,
        speaker_BS: torch.Tensor, mask_BZ: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The velocity (B, Z, E) at `x_BZE` and times `t_B` in [0, 1], in the dtype of the weights.

        `T_BZW` is what `condition` gives, `mask_BZ` (bool) True at real frames: others are heard by none of them.
        """
        c_B1W = self.cond_proj(torch.cat([self.time_embedder(t_B), speaker_BS], dim=-1))[:, None]
        u_BZW = self.transformer_input_proj(torch.cat([T_BZW, context_BZE, x_BZE], dim=-1))
        u_BZW = u_BZW + self.conv_embed(u_BZW, None if mask_BZ is None else mask_BZ[..., None])
        rotation = self._rotation(u_BZW)
        keys = None if mask_BZ is None else mask_BZ[:, None, None]
        for block in self.blocks:
            u_BZW = block(u_BZW, c_B1W, rotation, keys)
        return self.output_layer(u_BZW, c_B1W)

    def _rotation(self, u_BZW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        body = self.config.transformer
        frequencies = rotary_frequencies(body.hidden_size // body.num_heads, u_BZW.device)  # a copy would wait for it
        angles = torch.arange(u_BZW.shape[1], device=u_BZW.device)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(u_BZW.dtype), angles.sin().to(u_BZW.dtype)
