"""What the loss reports: sums with their counts, minima and maxima, merged exactly over micro-batches and ranks.

A micro-batch's metrics are a flat dict of scalar tensors on the device. The last part of a key says how to merge:
`kl.sum` and `kl.count` become the mean `kl`; `loss.sum` without a count stays a sum; `.min` and `.max` are extremes.
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

    With several ranks every rank calls it with the same metric names and collective sum and max reductions over a
    1-D tensor; a rank without work must call `policy_loss` on an all-masked row so that its names agree.
    """
    sums, maxima = {}, {}
    for entry in metrics:
        for key, value in entry.items():
            name, _, kind = key.rpartition(".")
            if kind in ("sum", "count"):
                sums[key] = sums.get(key, 0.0) + value.double()
            else:
                signed = -value if kind == "min" else value
                maxima[key] = torch.maximum(maxima[key], signed.double()) if key in maxima else signed.double()
    sums, maxima = _reduced(sums, reduce_sum), _reduced(maxima, reduce_max)
    result = {}
    for key, value in sums.items():
        name, _, kind = key.rpartition(".")
        if kind == "sum":
            count = sums.get(f"{name}.count")
            result[name] = value if count is None else value / max(count, 1.0)
    for key, value in maxima.items():
        name, _, kind = key.rpartition(".")
        result[name] = (-value if kind == "min" else value) if math.isfinite(value) else 0.0
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


def _reduced(values: dict[str, Tensor], reduce: Reduce | None) -> dict[str, float]:
    if not values:
        return {}
    names = sorted(values)
    stacked = torch.stack([values[name] for name in names])
    return dict(zip(names, (reduce(stacked) if reduce else stacked).tolist(), strict=True))
