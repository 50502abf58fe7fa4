"""Rows that end at random lengths, from a model without any sense of an end."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from covo_rl.bench.case import Workload
from covo_rl.bench.meter import Meter, medians
from covo_rl.bench.variants import Ours
from covo_rl.config import RolloutConfig
from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.packing import pack
from covo_rl.policy.rows import packed_hidden

#: the byte that becomes the end token
END_ID = 0


def sampling_of_lengths(case: Workload, *, repeats: int = 1, seed: int = 0) -> dict[str, Any]:
    """Sampling of ours where rows end at random lengths (`random`), beside rows that all reach C (`equal`).

    Where sampling takes `decode_rows`, also `random_in_turns`: half of the rows at a time, others as these end.
    """
    cell = case.cell
    ways = {"equal": case.config, "random": case.config}
    if "decode_rows" in {option.name for option in fields(RolloutConfig)}:
        ways["random_in_turns"] = replace(case.config, **{"decode_rows": max(1, cell.rows // 2)})
    row: dict[str, Any] = {"P": cell.positions, "G": cell.generations, "C": cell.completion, "clips": cell.clips}
    for name, config in ways.items():
        ours = Ours(replace(case, config=config))
        ours.encode()
        meters = [Meter(case.policy.device) for _ in range(repeats)]
        with nullcontext() if name == "equal" else random_lengths(case):
            ours.sample(min(4, cell.completion), seed)
            groups = [meter("sample", partial(ours.sample, cell.completion, seed)) for meter in meters][-1]
        row[name] = figures = medians(meters)
        lengths = sorted(len(rollout.completion_ids) for group in groups or () for rollout in group.rollouts)
        if lengths:
            figures |= {"tokens": sum(lengths), "median_length": statistics.median(lengths), "longest": lengths[-1]}
            figures["tokens_per_s"] = sum(lengths) / figures["sample_s"]
    return row


@contextmanager
def random_lengths(case: Workload) -> Iterator[None]:
    """Inside, every id ends its row with probability 2 / C on average, so that lengths are spread up to C.

    One row of the head is changed, and comes back bit by bit: no bias, no list of end ids, which decoding would
    treat in another way than a real model's.
    """
    family: Any = case.policy.family
    weight_VD = family.lm_head.weight
    row_D = weight_VD[END_ID].detach().clone()
    with torch.no_grad():
        weight_VD[END_ID] = _end_row(case, 2 / case.cell.completion)
    family.end_ids = (END_ID,)
    try:
        yield
    finally:
        family.end_ids = ()
        with torch.no_grad():
            weight_VD[END_ID] = row_D


@torch.no_grad()
def _end_row(case: Workload, probability: float) -> torch.Tensor:
    """(D,) The head's row with which this is the mean probability of the end token over random completions."""
    policy = case.policy
    packed = pack(case.groups()[:1], policy.family.audio_token_id, policy.device)
    with policy.evaluating():
        embeds_LD = policy.embedder.embed(packed, policy.features(case.prompts[:1]), policy.family)
        hidden_LD = packed_hidden(
            policy.family, packed.input_ids_L, embeds_LD, packed.position_ids_L, PackedLayout(packed)
        )
    hidden_MD = hidden_LD[packed.predictors_M[:256]]
    others_M = policy.family.lm_head(hidden_MD).float().logsumexp(-1)
    mean_D = hidden_MD.float().mean(0)
    end_M = hidden_MD.float() @ (mean_D / mean_D.norm() ** 2)  # 1 on average
    low, high = 0.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * end_M - others_M).sigmoid().mean() < probability else (low, middle)
    return (high * mean_D / mean_D.norm() ** 2).to(hidden_MD.dtype)
