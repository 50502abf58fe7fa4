"""One generated batch on one rank, and the small pure functions that cut, pad, mend and count it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from covo_rl.algo.advantage import Advantages, concatenated
from covo_rl.rewards.scoring import figures
from covo_rl.types import Group, RewardTable


@dataclass
class Batch:
    """One generated batch on this rank: groups, their scores, and what the loss needs (never repeated by G)."""

    groups: list[Group]
    table: RewardTable
    advantages: Advantages
    old_logps: list[torch.Tensor] | None = None  # per group (G, C); None: the loss pass is the old policy
    ref_logps: list[torch.Tensor] | None = None


def hash_seed(*parts: Any) -> int:
    """A 63-bit seed from the parts, the same in every process and session."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def chunks(items: Sequence, size: int) -> list[list]:
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
    """Rows of the chosen pieces, right-padded with zeros to (N, width)."""
    rows = []
    for p, rollouts in pieces:
        row = per_group[p][rollouts, :width]
        rows.append(torch.nn.functional.pad(row, (0, width - row.shape[1])))
    return torch.cat(rows)


def sampling_logps(group: Group, device: torch.device | str) -> torch.Tensor:
    """(G, C) float32 log-probs recorded while sampling, zero-padded."""
    width = max(len(r.logps) for r in group.rollouts)
    return torch.tensor([list(r.logps) + [0.0] * (width - len(r.logps)) for r in group.rollouts], device=device)


def loss_mask(groups: Sequence[Group], mask_NC: torch.Tensor, mask_truncated: bool) -> torch.Tensor:
    """(N, C) completion mask, with rows cut by length left out if asked for."""
    if not mask_truncated:
        return mask_NC
    kept = [r.stop_reason == "stop" for group in groups for r in group.rollouts]
    return mask_NC * torch.tensor(kept, device=mask_NC.device)[:, None]


def replace(
    groups: list[Group], table: RewardTable, keep: np.ndarray, more: list[Group], more_table: RewardTable
) -> tuple[list[Group], RewardTable]:
    """Put resampled groups in the places of those without variance."""
    slots = np.flatnonzero(~keep)
    rewards_PGR, rewards_PG = table.rewards_PGR.copy(), table.rewards_PG.copy()
    missing = {key: why for key, why in table.missing.items() if keep[key[0]]}
    groups = list(groups)
    for source, slot in enumerate(slots[: len(more)]):
        groups[slot] = more[source]
        rewards_PGR[slot], rewards_PG[slot] = more_table.rewards_PGR[source], more_table.rewards_PG[source]
        missing |= {(int(slot), g, n): why for (p, g, n), why in more_table.missing.items() if p == source}
    return groups, RewardTable(
        table.names, table.weights_R, rewards_PGR, rewards_PG, missing, table.seconds, table.metrics,
        _replaced_extras(table, more_table, slots),
    )  # fmt: skip


def _replaced_extras(table: RewardTable, more: RewardTable, slots: np.ndarray) -> dict[str, list[Any]]:
    """What rewards logged per rollout, with the resampled groups' values in their places."""
    generations = table.rewards_PG.shape[1]
    extras = {name: list(values) for name, values in table.extras.items() if name in more.extras}
    for name, values in extras.items():
        for source, slot in enumerate(slots[: len(more.rewards_PG)]):
            here, there = slot * generations, source * generations
            values[here : here + generations] = more.extras[name][there : there + generations]
    return extras


def sums(batch: Batch) -> dict[str, float]:
    """This rank's sums for `step_metrics`."""
    rollouts = [r for group in batch.groups for r in group.rollouts]
    sums = {
        "rollouts": float(len(rollouts)),
        "prompts": float(len(batch.groups)),
        "reward_total": float(np.nansum(batch.table.rewards_PG)),
        "graded_total": float(np.isfinite(batch.table.rewards_PG).sum()),
        "zero_variance_groups": float((~batch.advantages.informative_P).sum()),
        "completion_length": float(sum(len(r.completion_ids) for r in rollouts)),
        "truncated": float(sum(r.stop_reason == "length" for r in rollouts)),
        "format_broken": float(sum(bool(r.problems) for r in rollouts)),
    }
    for index, name in enumerate(batch.table.names):
        column = batch.table.rewards_PGR[:, :, index]
        sums[f"reward_{name}"] = float(np.nansum(column))
        sums[f"graded_{name}"] = float(np.isfinite(column).sum())
    for name, value in batch.table.metrics.items():
        if not name.startswith("rewards/"):  # those are made anew from the scores of all ranks
            sums[f"metric_{name}"] = value * len(rollouts)
    return sums


def step_metrics(parts: Sequence[tuple[dict[str, float], RewardTable]]) -> dict[str, float | None]:
    """`sums` and scores of every rank -> figures over all rollouts of the step, keyed as in metrics.jsonl.

    What rewards log by themselves is averaged over ranks by their rollouts.
    """
    totals: dict[str, float] = {}
    for part, _ in parts:
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    table = concatenated([table for _, table in parts])
    rollouts, prompts = (max(totals.pop(name), 1.0) for name in ("rollouts", "prompts"))
    metrics: dict[str, float | None] = {}
    for name in table.names:
        graded = totals.pop(f"graded_{name}")
        metrics[f"reward_{name}"] = totals.pop(f"reward_{name}") / graded if graded else None
        metrics[f"none_{name}"] = 1.0 - graded / rollouts
    metrics["reward_total"] = totals.pop("reward_total") / max(totals.pop("graded_total"), 1.0)
    metrics["zero_variance_groups"] = totals.pop("zero_variance_groups") / prompts
    metrics |= {name.removeprefix("metric_"): value / rollouts for name, value in totals.items()}
    figured = figures(table.names, table.rewards_PGR, table.rewards_PG)
    return metrics | {name: value for name, value in figured.items() if not name.endswith(("/mean", "/none"))}


def rollout_rows(batch: Batch) -> list[dict[str, Any]]:
    """One JSON-ready row per rollout; clips by name, never by waveform."""
    rows = []
    for p, group in enumerate(batch.groups):
        for g, rollout in enumerate(group.rollouts):
            rows.append(
                {
                    "id": group.prompt.example.id,
                    "clips": [clip.name for clip in group.prompt.example.clips],
                    "question": group.prompt.example.question,
                    "answer": group.prompt.example.answer,
                    "completion": rollout.text,
                    "stop_reason": rollout.stop_reason,
                    "problems": rollout.problems,
                    "rewards": dict(zip(batch.table.names, batch.table.rewards_PGR[p, g], strict=True)),
                    "reward_total": batch.table.rewards_PG[p, g],
                    "advantage": batch.advantages.advantages_PG[p, g],
                    "mean_logp": sum(rollout.logps) / max(len(rollout.logps), 1),
                    **{name: values[p * len(group.rollouts) + g] for name, values in batch.table.extras.items()},
                }
            )
    return rows
