"""A generated batch that is still in use <-> JSON and tensors: rollouts, rewards, advantages, log-probs.

Prompts are not stored: they are rebuilt from the data set by example id, and must have as many tokens as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covo_rl.algo.advantage import Advantages
from covo_rl.data.files import plain
from covo_rl.train.batch import Batch
from covo_rl.train.checkpoint.files import CheckpointError
from covo_rl.types import Group, Prompt, RewardTable, Rollout

ARRAYS = ("weights_R", "rewards_PGR", "rewards_PG")


def pack_batch(batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Batch -> (JSON-ready, tensors). Sampling log-probs are Python floats and survive JSON bit for bit."""
    about = {
        "groups": [
            {
                "example": group.prompt.example.id,
                "prompt_tokens": len(group.prompt.input_ids),
                "rollouts": [{f.name: getattr(rollout, f.name) for f in fields(Rollout)} for rollout in group.rollouts],
            }
            for group in batch.groups
        ],
        "names": list(batch.table.names),
        "missing": [[p, g, name, why] for (p, g, name), why in batch.table.missing.items()],
        "seconds": dict(batch.table.seconds),
        "metrics": dict(batch.table.metrics),
        "extras": plain(batch.table.extras),
        "statistics": dict(batch.advantages.statistics),
    }
    tensors = {f"table/{name}": torch.from_numpy(np.array(getattr(batch.table, name))) for name in ARRAYS}
    tensors |= {
        "advantages/advantages_PG": torch.from_numpy(np.array(batch.advantages.advantages_PG)),
        "advantages/informative_P": torch.from_numpy(np.array(batch.advantages.informative_P)),
        "advantages/rewards_PG": torch.from_numpy(np.array(batch.advantages.rewards_PG)),
    }
    for name in ("old_logps", "ref_logps"):
        for p, logps_GC in enumerate(getattr(batch, name) or []):
            tensors[f"{name}/{p:06d}"] = logps_GC
    return about, tensors


def unpack_batch(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], prompt_of: Callable[[str], Prompt], device: torch.device
) -> Batch:
    """Inverse of `pack`; `prompt_of` builds the prompt of an example id.

    Raises:
        CheckpointError: a prompt has another length than when it was sampled from.
    """
    groups = []
    for saved in about["groups"]:
        prompt = prompt_of(saved["example"])
        if len(prompt.input_ids) != saved["prompt_tokens"]:
            raise CheckpointError(
                f"row {saved['example']}: its prompt had {saved['prompt_tokens']} tokens when the rollouts in the "
                f"checkpoint were sampled and has {len(prompt.input_ids)} now; resume from a checkpoint without a dot"
            )
        groups.append(Group(prompt, tuple(_rollout(rollout) for rollout in saved["rollouts"])))
    arrays: dict[str, Any] = {name: tensors[f"table/{name}"].numpy() for name in ARRAYS}
    table = RewardTable(
        names=tuple(about["names"]),
        missing={(p, g, name): why for p, g, name, why in about["missing"]},
        seconds=about["seconds"],
        metrics=about["metrics"],
        extras=about["extras"],
        **arrays,
    )
    result = Advantages(
        tensors["advantages/advantages_PG"].numpy(),
        tensors["advantages/informative_P"].numpy(),
        tensors["advantages/rewards_PG"].numpy(),
        about["statistics"],
    )
    logps = {name: _per_group(tensors, name, device) for name in ("old_logps", "ref_logps")}
    return Batch(groups, table, result, **logps)


def _rollout(saved: Mapping[str, Any]) -> Rollout:
    """Tuples again where JSON made lists."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    return Rollout(**values)


def _per_group(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> list[Tensor] | None:
    keys: Sequence[str] = sorted(key for key in tensors if key.startswith(f"{name}/"))
    return [tensors[key].to(device) for key in keys] or None
