"""Floating-point operations of a step, counted by hand: the ratio of stock to ours is the ceiling of any speed-up.

A product of (a, b) and (b, c) counts 2abc. The backward of a frozen linear layer costs its forward once more (the
gradient of its input), that of attention twice. LoRA, norms and activations are left out: they are small, and the
same per position in both variants.
"""

from __future__ import annotations

from dataclasses import dataclass

from covo_rl.bench.case import DOWNSAMPLE, SECONDS, Cell, Sizes

FRAMES_PER_SECOND = 100


@dataclass(frozen=True)
class Work:
    """Operations of one step by phase."""

    encode: float
    prefill: float
    decode: float
    old: float
    loss: float

    @property
    def total(self) -> float:
        return self.encode + self.prefill + self.decode + self.old + self.loss


def encoder_flops(cell: Cell, sizes: Sizes) -> float:
    """Encoder and adapter over one 30 s clip."""
    width, frames = sizes.encoder_width, SECONDS * FRAMES_PER_SECOND
    length = frames / 2
    convolutions = 2 * 3 * (80 * width * frames + width * width * length)
    layers = sizes.encoder_layers * (2 * 12 * width**2 * length + 4 * length**2 * width)
    adapter, stage, factor = 0.0, length, DOWNSAMPLE[cell.positions]
    while factor > 1:
        factor //= 2
        stage = -(-stage // 2)
        out = sizes.decoder_width if factor == 1 else width
        adapter += 2 * stage * (3 * width**2 + 2 * width * width + 2 * width * out)
    return convolutions + layers + adapter


def _linear(sizes: Sizes) -> float:
    """Decoder layers per position, without attention: q, o, k and v at half as many heads, three of the MLP (3 D)."""
    return 2 * sizes.decoder_layers * sizes.decoder_width**2 * (2 + 1 + 9)


def _attention(sizes: Sizes, pairs: float) -> float:
    """Scores and weighted values over `pairs` of query and key."""
    return 4 * sizes.decoder_layers * sizes.decoder_width * pairs


def _causal(length: float) -> float:
    return length * (length + 1) / 2


def flops(cell: Cell, sizes: Sizes, prompt_length: int, *, stock: bool) -> Work:
    """Work of one step over `cell.clips` prompts of `prompt_length` positions."""
    T, C, U = prompt_length, cell.completion, cell.clips
    N = U * cell.generations
    head = 2 * sizes.decoder_width * sizes.vocabulary
    copies = N if stock else U
    encode = encoder_flops(cell, sizes)
    prompt = copies * (T * _linear(sizes) + _attention(sizes, _causal(T)))
    completion = N * (C * _linear(sizes) + _attention(sizes, C * T + _causal(C)))
    scored = N * C
    linear = (copies * T + N * C) * _linear(sizes)
    attention = _attention(sizes, copies * _causal(T) + N * (C * T + _causal(C)))
    audio = copies * encode if stock else 0.0
    return Work(
        encode=copies * encode,
        prefill=prompt,
        decode=completion + N * C * head,
        old=audio + completion + scored * head + (prompt if stock else 0.0),
        loss=audio + 2 * linear + 3 * attention + 2 * scored * head,
    )
