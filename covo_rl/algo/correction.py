"""The engine that samples and the policy that trains: how far they are apart, and the weights that make up for it.

Two ratios, kept apart as in decoupled PPO (arXiv 2110.00641):

    surrogate   clipped on pi / pi_old      pi_old scored by this package, before the batch's first update
    weight      min(pi_old / pi_engine, C)  pi_engine as the engine recorded it, in its arithmetic and of its version

The weight is truncated importance sampling (Ionides, 2008). A difference is log pi_old - log pi_engine of a sampled
token, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covo_rl.algo.metrics import Metrics, extreme_metric, mean_metric
from covo_rl.config import LossConfig

#: metrics that are of a batch's first update alone: its policy is pi_old
MISMATCH = ("sampling/", "engine/")
QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99, "p999": 0.999}
#: so that the square of no ratio overflows
LARGEST_LOG_RATIO = 50.0


def sampler_weights(difference_NC: Tensor, mask_NC: Tensor, config: LossConfig) -> Tensor:
    """pi_old / pi_engine per token, or their product over the sequence in every place; 1 for unreported tokens.

    Above the cap it is the cap (truncate; TIS) or 0 (mask; IcePop, MIS), as TRL's `vllm_importance_sampling_mode`.
    """
    exponent_NC = difference_NC = torch.nan_to_num(difference_NC, nan=0.0).detach()
    level, _, above = config.sampler_correction_mode.partition("_")
    if level == "sequence":
        exponent_NC = (difference_NC * mask_NC).sum(-1, keepdim=True).expand_as(difference_NC)
    ratio_NC, cap = exponent_NC.exp(), config.sampler_correction_cap
    return ratio_NC.clamp(max=cap) if above == "truncate" else ratio_NC.masked_fill(ratio_NC > cap, 0.0)


def mismatch_metrics(
    metrics: Metrics, difference_NC: Tensor, weights_NC: Tensor, mask_NC: Tensor, config: LossConfig
) -> None:
    """TRL's figures of the differences and the weights in use, and the differences themselves for `mismatch`."""
    mean_metric(metrics, "sampling/sampling_logp_difference/mean", difference_NC.abs(), mask_NC)
    extreme_metric(metrics, "sampling/sampling_logp_difference/max.max", difference_NC.abs(), mask_NC)
    mean_metric(metrics, "sampling/importance_sampling_ratio/mean", weights_NC, mask_NC)
    extreme_metric(metrics, "sampling/importance_sampling_ratio/max.max", weights_NC, mask_NC)
    extreme_metric(metrics, "sampling/importance_sampling_ratio/min.min", weights_NC, mask_NC)
    # nan rather than a selection by the mask, for which a GPU would be waited for
    metrics["engine/tokens.values"] = torch.where(mask_NC, difference_NC.detach(), math.nan).flatten()
    if config.sampler_correction_mode.startswith("sequence"):
        sums_N = (difference_NC.detach() * mask_NC).sum(-1)
        metrics["engine/sequences.values"] = torch.where(mask_NC.any(-1), sums_N, math.nan)


def mismatch(
    parts: Sequence[Metrics], config: LossConfig, gathered: Callable[[Any], list[Any]] = lambda value: [value]
) -> dict[str, float]:
    """How far engine and policy are apart over all micro-batches and, by `gathered`, ranks; empty if no token counts.

    With d = log pi_old - log pi_engine of a token of the engine, `kl_k1` (mean of -d) and `kl_k3` (mean of
    e^d - 1 - d, never negative) estimate KL(pi_engine || pi_old) in nats a token (http://joschu.net/blog/kl-approx.html).
    `ratio_*`, `truncated_share` and `ess` are of the ratios before the cap, by token or by sequence as
    `sampler_correction_mode` says. `ess` is Kish's (sum r)^2 / (n sum r^2): the share of the sample that it is worth.
    """
    tokens, sequences = "engine/tokens.values", "engine/sequences.values"
    names = [name for name in (tokens, sequences) if parts and name in parts[0]]
    here = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in names}
    every = gathered({name: values[~np.isnan(values)] for name, values in here.items()}) if names else []
    values = {name: np.concatenate([some[name] for some in every]).astype(np.float64) for name in names}
    if not names or not values[tokens].size:
        return {}
    difference, ratio = values[tokens], _ratios(values[names[-1]])
    figures = {
        "kl_k1": -difference.mean(),
        "kl_k3": (np.expm1(difference.clip(max=LARGEST_LOG_RATIO)) - difference).mean(),
        "max_abs": abs(difference).max(),
        "share_above_0.1": (abs(difference) > 0.1).mean(),
        **{f"ratio_{name}": np.quantile(ratio, share) for name, share in QUANTILES.items()},
        "ess": ratio.sum() ** 2 / (ratio.size * (ratio**2).sum()),
    }
    if config.sampler_correction:
        figures["truncated_share"] = (ratio > config.sampler_correction_cap).mean()
    return {f"engine/{name}": float(value) for name, value in figures.items()}


def _ratios(log_ratios: np.ndarray) -> np.ndarray:
    return np.exp(log_ratios.clip(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
