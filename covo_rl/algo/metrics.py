"""What the loss reports: sums with their counts, minima and maxima, merged exactly over micro-batches and ranks.

A micro-batch's metrics are a flat dict of scalar tensors on the device. The last part of a key says how to merge:
`kl.sum` and `kl.count` become the mean `kl`; `loss.sum` without a count stays a sum; `.min` and `.max` are extremes.
`.values` are single values, of which correction.py makes quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]


def summarise(
    metrics: Sequence[Metrics], *, reduce_sum: Reduce | None = None, reduce_max: Reduce | None = None
) -> dict[str, float]:
    """Metrics of all micro-batches -> one number per name: token-weighted means, sums, minima, maxima.

    With several ranks every rank calls it with the same metric names, and with collective sum and max reductions
    over a 1-D float64 CPU tensor. A rank without work must have called `policy_loss` once on an all-masked batch.
    """
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for entry in metrics:
        keys = [key for key in entry if not key.endswith(".values")]
        values = torch.stack([entry[key].detach().float() for key in keys]).cpu().double().tolist()
        for key, value in zip(keys, values, strict=True):
            if key.endswith((".sum", ".count")):
                sums[key] = sums.get(key, 0.0) + value
            else:
                maxima[key] = max(maxima.get(key, -math.inf), -value if key.endswith(".min") else value)
    sums, maxima = _reduced(sums, reduce_sum), _reduced(maxima, reduce_max)
    result = {}
    for key, value in sums.items():
        name, _, kind = key.rpartition(".")
        if kind == "sum":
            count = sums.get(f"{name}.count")
            result[name] = value if count is None else value / max(count, 1.0)
    for key, value in maxima.items():
        name, _, kind = key.rpartition(".")
        nothing_counted = value == -math.inf
        result[name] = 0.0 if nothing_counted else (-value if kind == "min" else value)
    return result


def mean_metric(metrics: Metrics, name: str, values: Tensor, counted: Tensor) -> None:
    """Sum and count of `values` where `counted`."""
    metrics[f"{name}.sum"] = torch.where(counted, values.detach().float(), 0.0).sum()
    metrics[f"{name}.count"] = counted.sum()


def sum_metric(metrics: Metrics, name: str, value: Tensor) -> None:
    """A share that only adds up."""
    metrics[f"{name}.sum"] = value.detach()


def extreme_metric(metrics: Metrics, key: str, values: Tensor, counted: Tensor) -> None:
    """Minimum or maximum of `values` where `counted`; the key ends in .min or .max."""
    if key.endswith(".min"):
        metrics[key] = torch.where(counted, values.detach().float(), math.inf).amin()
    else:
        metrics[key] = torch.where(counted, values.detach().float(), -math.inf).amax()


def clip_metrics(metrics: Metrics, low_hit: Tensor, high_hit: Tensor, counted: Tensor) -> None:
    """TRL's clip ratios: means over tokens (or sequences), smallest and largest share of a sequence."""
    mean_metric(metrics, "clip_ratio/low_mean", low_hit, counted)
    mean_metric(metrics, "clip_ratio/high_mean", high_hit, counted)
    mean_metric(metrics, "clip_ratio/region_mean", low_hit | high_hit, counted)
    tokens_N = counted.sum(-1)
    low_N, high_N = ((hit & counted).sum(-1) / tokens_N.clamp(min=1) for hit in (low_hit, high_hit))
    extreme_metric(metrics, "clip_ratio/low_min.min", low_N, tokens_N > 0)
    extreme_metric(metrics, "clip_ratio/high_max.max", high_N, tokens_N > 0)


def _reduced(values: dict[str, float], reduce: Reduce | None) -> dict[str, float]:
    if reduce is None or not values:
        return values
    names = sorted(values)
    reduced = reduce(torch.tensor([values[name] for name in names], dtype=torch.float64))
    return dict(zip(names, reduced.tolist(), strict=True))
