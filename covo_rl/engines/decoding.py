"""The decode loop: all rollouts of all prompts advance together from shared prompt keys; finished ones drop out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from covo_rl.engines.decode_weights import decode_layers
from covo_rl.engines.draws import Drawing, draw, noise_dtype, prompt_noise
from covo_rl.engines.key_values import DecodeLayout
from covo_rl.policy.attention import KeyValues, PackedLayout
from covo_rl.policy.features import Features
from covo_rl.policy.packing import Span, identity, pack, unique_prompts
from covo_rl.policy.policy import PromptCache
from covo_rl.policy.products import float32_logits
from covo_rl.policy.sharding import most
from covo_rl.types import Group

if TYPE_CHECKING:
    from covo_rl.config import RolloutConfig
    from covo_rl.policy.policy import Policy
    from covo_rl.types import Prompt

#: prompt positions in one prefill call
PREFILL_POSITIONS = 2**16

#: finished rows are dropped once they are more than this share of the batch
DROP_SHARE = 0.25


class Draws(NamedTuple):
    """Sampled completions, one row per rollout: ids (N, C) int64 and log-probs (N, C) float32 on the CPU.

    `lengths_N` counts ids, end token included; `stopped_N` says that an end token came.
    """

    ids_NC: torch.Tensor
    logps_NC: torch.Tensor
    lengths_N: torch.Tensor
    stopped_N: torch.Tensor


def decode_rollouts(
    layout: DecodeLayout,
    hidden_ND: torch.Tensor,
    prompt_lengths_N: torch.Tensor,
    noise_NC: torch.Tensor,
    *,
    step: Callable[[torch.Tensor, torch.Tensor, DecodeLayout], torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    how: Drawing,
    end_ids: torch.Tensor,
    anyone: Callable[[bool], bool],
    check_every: int = 1,
) -> Draws:
    """Draw up to C tokens per row.

    `hidden_ND` predicts the first token; rows in `layout.order`. `step(ids_R, positions_R, layout)` gives the next
    hidden states (R, D), `logits(hidden)` float32 logits over the temperature. `anyone` turns "this rank goes on"
    into "some rank goes on" where sharded ranks must make the same number of steps. Results are in the caller's
    row order, undone from `layout.order`.
    """
    rows, limit = noise_NC.shape
    device = hidden_ND.device
    ids_NC = torch.zeros(rows, limit, dtype=torch.int64, device=device)
    logps_NC = torch.zeros(rows, limit, dtype=torch.float32, device=device)
    stopped_N = torch.zeros(rows, dtype=torch.bool, device=device)
    lengths_N = torch.full((rows,), limit, dtype=torch.int64, device=device)
    order = torch.tensor(layout.order, device=device)
    active = order  # caller's row numbers, in the layout's order
    hidden = hidden_ND[order]
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for position in range(limit):
        tokens, logps = draw(logits(hidden), noise_NC[active, position], how)
        ids_NC[active, position] = tokens
        logps_NC[active, position] = logps
        now = torch.isin(tokens, end_ids) & ~ended
        ended = ended | now
        lengths_N[active] = torch.where(now, position + 1, lengths_N[active])
        stopped_N[active] |= now
        if position + 1 == limit:
            break
        if (position + 1) % check_every == 0:
            finished = int(ended.sum())
            if not anyone(finished < len(active)):
                break
            if DROP_SHARE * len(active) < finished < len(active):
                unfinished = (~ended).nonzero()[:, 0]
                layout.keep(unfinished.tolist())
                active, tokens, ended = active[unfinished], tokens[unfinished], ended[unfinished]
        hidden = step(tokens, prompt_lengths_N[active] + position, layout)
        layout.step += 1
    written_NC = torch.arange(limit, device=device)[None, :] < lengths_N[:, None]
    return Draws(
        ids_NC.masked_fill(~written_NC, 0).cpu(),
        logps_NC.masked_fill(~written_NC, 0.0).cpu(),
        lengths_N.cpu(),
        stopped_N.cpu(),
    )


@torch.no_grad()
def sample_draws(
    policy: Policy,
    prompts: Sequence[Prompt],
    features: Features,
    config: RolloutConfig,
    *,
    seed: int,
    generations: int,
    greedy: bool = False,
    keep_prompts: bool = False,
) -> Draws:
    """Prefill every unique prompt once, then decode `generations` rollouts of each, prompt-major.

    `keep_prompts` leaves the prompts' keys to `Policy.old_logps`, until the next call.
    """
    device, family, sharded = policy.device, policy.family, policy.sharded
    policy.prompt_cache = None
    policy.autocast_seen |= torch.is_autocast_enabled(device.type)
    how = Drawing(config.temperature, config.top_p, config.top_k, config.min_p, greedy)
    limit = config.max_completion_length
    if not prompts and not sharded:
        return Draws(*(torch.zeros(shape) for shape in ((0, limit), (0, limit), 0, 0)))  # type: ignore[arg-type]
    unique, index = unique_prompts(prompts)
    noise = torch.zeros(len(prompts), generations, limit) if greedy else prompt_noise(prompts, seed, generations, limit)
    prompt_of_row = [p for p in index for _ in range(generations)]
    rows = torch.tensor(prompt_of_row, device=device)

    def step(ids_R: torch.Tensor, positions_R: torch.Tensor, layout: DecodeLayout) -> torch.Tensor:
        policy.counters.decode_positions += ids_R.numel()
        return policy.hidden_states(family, family.embed_tokens(ids_R), positions_R, layout)

    def logits(hidden_RD: torch.Tensor) -> torch.Tensor:
        logits_RV = float32_logits(family.lm_head, hidden_RD)
        return logits_RV if how.temperature == 1.0 else logits_RV / how.temperature

    limit_bytes = 0 if sharded else int(policy.decode_weights_mb * 2**20)
    with policy.evaluating():
        keys, spans, last_PD = prefill(policy, unique, features)
        lengths_P = torch.tensor([end - start for start, end in spans], device=device)
        with decode_layers(family, rows=len(prompt_of_row), limit_bytes=limit_bytes):
            draws = decode_rollouts(
                DecodeLayout(keys, spans, prompt_of_row, shared=config.shared_decode),
                last_PD[rows],
                lengths_P[rows],
                noise.flatten(0, 1).to(noise_dtype(device)).to(device),
                step=step,
                logits=logits,
                how=how,
                end_ids=torch.tensor(sorted({*family.eos_token_ids}), device=device),
                anyone=(lambda value: bool(most(int(value), device))) if sharded else bool,
                check_every=1 if device.type == "cpu" else 8,
            )
    if keep_prompts and not sharded:
        numbers = {identity(prompt): n for n, prompt in enumerate(unique)}
        policy.prompt_cache = PromptCache(keys, numbers, spans, last_PD, version=policy.weights_version())
    return draws


def prefill(
    policy: Policy, prompts: Sequence[Prompt], features: Features
) -> tuple[KeyValues, list[Span], torch.Tensor]:
    """Keys and values of all prompts, packed per layer (L, K, d), their spans, and their last hidden states (P, D)."""
    parts: list[KeyValues] = []
    spans: list[Span] = []
    last: list[torch.Tensor] = []
    offset = 0
    # sharded ranks must make the same number of calls, so they take all prompts at once
    for part in [list(prompts)] if policy.sharded else _within(prompts, PREFILL_POSITIONS):
        packed = pack([Group(prompt, ()) for prompt in part], policy.family.audio_token_id, policy.device)
        capture: KeyValues = {}
        embeds_LD = policy.embedder.embed(packed, features, policy.family)
        hidden_LD = policy.hidden_states(
            policy.family, embeds_LD, packed.position_ids_L, PackedLayout(packed, capture=capture)
        )
        policy.count(packed)
        last.append(hidden_LD[[end - 1 for _, end in packed.prompt_spans]])
        spans += [(start + offset, end + offset) for start, end in packed.prompt_spans]
        offset += packed.prompt_positions
        parts.append(capture)
    keys = parts[0]
    if len(parts) > 1:
        keys = {
            layer: (torch.cat([part[layer][0] for part in parts]), torch.cat([part[layer][1] for part in parts]))
            for layer in parts[0]
        }
    return keys, spans, torch.cat(last)


def _within(prompts: Sequence[Prompt], positions: int) -> list[list[Prompt]]:
    """Consecutive prompts, at most `positions` together."""
    parts: list[list[Prompt]] = [[]]
    total = 0
    for prompt in prompts:
        if parts[-1] and total + len(prompt.input_ids) > positions:
            parts.append([])
            total = 0
        parts[-1].append(prompt)
        total += len(prompt.input_ids)
    return parts
