"""One generated batch on one rank, and the small pure functions that cut, pad and refill it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from covo_rl.algo.advantage import Advantages
from covo_rl.algo.loss import mask_truncated
from covo_rl.config import ConfigError, LossConfig
from covo_rl.train.guard import not_finite_parameters
from covo_rl.types import Group, RewardTable


@dataclass
class Batch:
    """Groups, their scores, and what the loss needs (by group, never repeated by G).

    `version` counts the optimiser updates behind the policy that the batch's first update changes.
    """

    groups: list[Group]
    table: RewardTable
    advantages: Advantages
    old_logps: list[torch.Tensor] | None = None  # per group (G, C); None: the loss pass is the old policy
    ref_logps: list[torch.Tensor] | None = None
    version: int = 0


def hash_seed(*parts: Any) -> int:
    """A 63-bit seed from the parts, the same in every process and session."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def chunks(items: Sequence, size: int) -> list[list]:
    """Consecutive items, `size` at a time."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


#: a group's index in its batch, and which of its rollouts
Piece = tuple[int, slice]


def micro_batches(members: Sequence[int], prompts: int, rollouts: int, generations: int) -> list[list[Piece]]:
    """`prompts` whole groups at a time or, where `rollouts` is set and below G, `rollouts` of one group at a time."""
    if rollouts and rollouts < generations:
        return [[(p, slice(g, g + rollouts))] for p in members for g in range(0, generations, rollouts)]
    return [[(p, slice(0, generations)) for p in some] for some in chunks(members, prompts)]


def group_piece(groups: Sequence[Group], piece: Piece) -> Group:
    """Some rollouts of a group; each piece computes the prompt once more."""
    return Group(groups[piece[0]].prompt, groups[piece[0]].rollouts[piece[1]])


def padded(
    per_group: Sequence[torch.Tensor] | Mapping[int, torch.Tensor], pieces: Sequence[Piece], width: int
) -> torch.Tensor:
    """Rows of the pieces, right-padded with zeros to (N, width)."""
    rows = [per_group[p][rollouts, :width] for p, rollouts in pieces]
    return stacked([rows[0].new_zeros(0, width), *rows])


def stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of one group, scored in parts: (g, C) of different widths -> (G, C), right-padded with zeros."""
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])


def sampling_logps(group: Group, device: torch.device | str) -> torch.Tensor:
    """(G, C) float32 log-probs recorded while sampling, zero-padded."""
    width = max(len(r.logps) for r in group.rollouts)
    return torch.tensor([list(r.logps) + [0.0] * (width - len(r.logps)) for r in group.rollouts], device=device)


def check_policy_ids(config: LossConfig, code_ids: range) -> None:
    """Raises ConfigError: the loss is to tell text from audio codes, of which the family has none."""
    if config.policy_ids != "all" and not code_ids:
        raise ConfigError([f"policy_ids {config.policy_ids}: this model's replies hold no audio codes: leave it out"])


def loss_mask(
    groups: Sequence[Group], mask_NC: torch.Tensor, config: LossConfig, code_ids: range = range(0)
) -> torch.Tensor:
    """(N, C) completion mask of the ids that `policy_ids` names, without rows cut by length if asked for.

    What is no audio code is text, the end too.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if config.policy_ids != "all":
        counted_NC = np.zeros(mask_NC.shape, dtype=bool)
        for row_C, rollout in zip(counted_NC, rollouts, strict=True):
            ids_C = np.array(rollout.completion_ids)
            is_code_C = (ids_C >= code_ids.start) & (ids_C < code_ids.stop)
            row_C[: len(ids_C)] = is_code_C if config.policy_ids == "codes" else ~is_code_C
        mask_NC = mask_NC & torch.from_numpy(counted_NC).to(mask_NC.device)
    if config.mask_truncated_completions:
        truncated_N = [rollout.stop_reason == "length" for rollout in rollouts]
        mask_NC = mask_truncated(mask_NC, torch.tensor(truncated_N, device=mask_NC.device))
    return mask_NC


def refill(
    groups: list[Group], table: RewardTable, keep_P: np.ndarray, more: list[Group], more_table: RewardTable
) -> tuple[list[Group], RewardTable]:
    """Put resampled groups in the places of those without variance, what rewards logged of them included."""
    generations = table.rewards_PG.shape[1]
    places = list(zip(range(len(more)), np.flatnonzero(~keep_P).tolist(), strict=False))
    groups = list(groups)
    rewards_PGR, rewards_PG = table.rewards_PGR.copy(), table.rewards_PG.copy()
    missing = {key: why for key, why in table.missing.items() if keep_P[key[0]]}
    extras = {name: list(values) for name, values in table.extras.items() if name in more_table.extras}
    for source, place in places:
        groups[place] = more[source]
        rewards_PGR[place], rewards_PG[place] = more_table.rewards_PGR[source], more_table.rewards_PG[source]
        missing |= {(place, g, name): why for (p, g, name), why in more_table.missing.items() if p == source}
        for name, values in extras.items():
            new = more_table.extras[name][source * generations : (source + 1) * generations]
            values[place * generations : (place + 1) * generations] = new
    return groups, replace(table, rewards_PGR=rewards_PGR, rewards_PG=rewards_PG, missing=missing, extras=extras)


def finite_logps(batch: Batch, members: Sequence[int]) -> bool:
    """Whether sampling, old and reference log-probs of these groups are all finite."""
    sampled = all(math.isfinite(x) for p in members for r in batch.groups[p].rollouts for x in r.logps)
    stored = [logps[p] for logps in (batch.old_logps, batch.ref_logps) if logps is not None for p in members]
    return sampled and all(bool(torch.isfinite(logps_GC).all()) for logps_GC in stored)


def update_details(batch: Batch, members: Sequence[int], policy: torch.nn.Module) -> dict[str, Any]:
    """What a dump of a skipped update says of its rows and of the policy."""
    rows = [
        {
            "id": batch.groups[p].prompt.example.id,
            "advantages": batch.advantages.advantages_PG[p].tolist(),
            "completions": [r.text for r in batch.groups[p].rollouts],
            "sampling_logps": [str(min(r.logps, default=0.0)) for r in batch.groups[p].rollouts],
        }
        for p in members
    ]
    return {"rows": rows, "not_finite_in": not_finite_parameters(policy)}
