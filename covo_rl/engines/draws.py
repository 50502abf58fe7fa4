"""Drawing tokens from logits with noise that belongs to the prompt, not to the batch.

Every prompt has its own generator and draws its uniform numbers [G, C] before decoding starts, so that its rollouts
are the same whatever else is in the batch, on however many ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from covo_rl.types import Prompt

BLOCK = 512


@dataclass(frozen=True)
class Drawing:
    """How a token is chosen: `greedy`, or sampled at `temperature` after top-k, top-p and min-p truncation."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    greedy: bool = False

    @property
    def truncates(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


def prompt_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """63 bits for each prompt, of (seed, row id, ids, clips, occurrence in this call)."""
    occurrences: dict[tuple, int] = {}
    seeds = []
    for prompt in prompts:
        name = (prompt.example.id, prompt.input_ids, prompt.clip_keys)
        occurrences[name] = occurrences.get(name, -1) + 1
        digest = hashlib.sha256(repr((seed, *name, occurrences[name])).encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)
    return seeds


def prompt_noise(prompts: Sequence[Prompt], seed: int, generations: int, length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), (P, G, C) float64, from `prompt_seeds`."""
    blocks = []
    for number in prompt_seeds(prompts, seed):
        generator = torch.Generator().manual_seed(number)
        blocks.append(torch.rand(generations, length, generator=generator, dtype=torch.float64))
    return torch.stack(blocks) if blocks else torch.zeros(0, generations, length, dtype=torch.float64)


def noise_dtype(device: torch.device) -> torch.dtype:
    """float64 for noise and sums of probabilities, where the device has it; Apple's GPUs do not."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(logits_RV: torch.Tensor, noise_R: torch.Tensor, how: Drawing) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) int64 and their log-probs (R,) float32 under softmax(logits / temperature), before truncation.

    `logits_RV` float32, already divided by the temperature; `noise_R` uniform in `noise_dtype`.
    """
    logps_RV = logits_RV.log_softmax(-1)
    if how.greedy:
        tokens_R = logps_RV.argmax(-1)
    else:
        probs_RV = logps_RV.exp()
        tokens_R = _inverse_cdf(truncated(probs_RV, how) if how.truncates else probs_RV, noise_R)
    return tokens_R, logps_RV.gather(1, tokens_R[:, None])[:, 0]


def truncated(probs_RV: torch.Tensor, how: Drawing) -> torch.Tensor:
    """Probabilities with the tokens set to 0 that top-k, then top-p, then min-p leave out (transformers' order)."""
    keep_RV = torch.ones_like(probs_RV, dtype=torch.bool)
    if 0 < how.top_k < probs_RV.shape[1]:
        keep_RV &= probs_RV >= probs_RV.topk(how.top_k, -1).values[:, -1:]
    if how.top_p < 1.0:
        keep_RV &= _nucleus(probs_RV * keep_RV, how.top_p)
    if how.min_p > 0.0:
        keep_RV &= probs_RV >= how.min_p * probs_RV.amax(-1, keepdim=True)
    return probs_RV * keep_RV


def _nucleus(probs_RV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The likeliest tokens before which less than `top_p` of the mass lies; of equally likely ones the first ones.

    No sort: the least probability that stays is searched for among float32 numbers, whose bits, as an integer, have
    their order. Nothing of it waits for the host.
    """
    total_dtype = noise_dtype(probs_RV.device)
    target_R1 = top_p * probs_RV.sum(-1, keepdim=True, dtype=total_dtype)

    def above(level_R1: torch.Tensor) -> torch.Tensor:
        return torch.where(probs_RV > level_R1, probs_RV, 0.0).sum(-1, keepdim=True, dtype=total_dtype)

    low_R1 = torch.zeros_like(target_R1, dtype=torch.int32)
    high_R1 = probs_RV.amax(-1, keepdim=True).view(torch.int32)
    for _ in range(30):  # a probability has 30 bits: sign and highest exponent bit are 0
        middle_R1 = low_R1 + (high_R1 - low_R1) // 2
        enough_R1 = above(middle_R1.view(torch.float32)) < target_R1
        high_R1 = torch.where(enough_R1, middle_R1, high_R1)
        low_R1 = torch.where(enough_R1, low_R1, middle_R1 + 1)
    level_R1 = high_R1.view(torch.float32)
    equal_RV = probs_RV == level_R1
    room_R1 = (target_R1 - above(level_R1)) / level_R1  # of equal ones so many begin before the target
    return (probs_RV > level_R1) | (equal_RV & (equal_RV.cumsum(-1) - 1 < room_R1))


def _inverse_cdf(weights_RV: torch.Tensor, noise_R: torch.Tensor) -> torch.Tensor:
    """Index drawn in proportion to the weights; sums in the noise's float64, so that long tails keep their mass.

    Large vocabularies go in two steps, block then token, so that the sums stay small.
    """
    rows, size = weights_RV.shape
    if size <= 8 * BLOCK:
        return _pick(weights_RV, noise_R)[0]
    padded = torch.nn.functional.pad(weights_RV, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    block_R, rest_R = _pick(padded.sum(-1, dtype=noise_R.dtype), noise_R)
    inside = padded[torch.arange(rows, device=padded.device), block_R]
    return block_R * BLOCK + _pick(inside, rest_R)[0]


def _pick(weights_RV: torch.Tensor, noise_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index whose interval of the cumulative sum holds noise * total, and the place inside it as new noise."""
    weights_RV = weights_RV.to(noise_R.dtype)
    cdf_RV = weights_RV.cumsum(-1)
    level_R1 = noise_R[:, None] * cdf_RV[:, -1:]
    index_R1 = torch.searchsorted(cdf_RV, level_R1, right=True)
    # a level that rounds to the total belongs to the last index with any weight
    last_R1 = (cdf_RV < cdf_RV[:, -1:]).sum(-1, keepdim=True)
    index_R1 = torch.minimum(index_R1, last_R1)
    weight_R1 = weights_RV.gather(1, index_R1)
    below_R1 = cdf_RV.gather(1, index_R1) - weight_R1
    rest_R1 = ((level_R1 - below_R1) / weight_R1).clamp(0.0, 1.0 - 1e-12)
    return index_R1[:, 0], rest_R1[:, 0]
