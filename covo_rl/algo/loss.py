"""The GRPO objectives: log-probs and advantages in, (loss, metrics) out. Pure tensors, no model.

Every loss type divides by a count of sequences or tokens. Those counts are taken once per optimiser step, over all
micro-batches and all ranks (`Normalizer`), so what `policy_loss` returns for a micro-batch is its exact share:

    sum over micro-batches and ranks of policy_loss(...)  ==  policy_loss(the whole batch)

DDP and FSDP average gradients over ranks, hence `(loss * normalizer.world_size).backward()` and no further scaling.

    type      per token or sequence                            divided by
    grpo      clipped surrogate                                tokens of the sequence, then sequences
    bnpo      clipped surrogate                                tokens of the step
    dapo      clipped surrogate                                tokens of the generation batch / steps per generation
    dr_grpo   clipped surrogate                                sequences * max_completion_length
    luspo     clipped surrogate at sequence level              sequences (so a sequence counts by its length)
    cispo     stop-gradient(min(ratio, epsilon_high)) * logp   as dapo
    sapo      sigmoid gate around ratio 1                      as grpo
    vespo     gamma weight of the sequence ratio * logp        as dapo

GSPO (arXiv 2507.18071) is `importance_sampling_level: sequence`. The numbers agree with TRL 1.16's GRPOTrainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from covo_rl.algo.correction import mismatch_metrics, sampler_weights
from covo_rl.algo.metrics import Metrics, clip_metrics, extreme_metric, mean_metric, sum_metric
from covo_rl.algo.normalizer import (
    Normalizer,
    by_batch_tokens,
    by_full_length,
    by_sequences,
    by_step_tokens,
    entropy_threshold,
    sequence_means,
)  # fmt: skip
from covo_rl.config import LossConfig

#: range of VESPO's log weights, as in its published code
VESPO_LOG_MIN, VESPO_LOG_MAX = math.log(1e-8), 20.0


def policy_loss(
    logps_NC: Tensor,
    old_logps_NC: Tensor | None,
    advantages_N: Tensor,
    mask_NC: Tensor,
    config: LossConfig,
    *,
    normalizer: Normalizer,
    max_completion_length: int,
    ref_logps_NC: Tensor | None = None,
    entropy_NC: Tensor | None = None,
    sampler_logps_NC: Tensor | None = None,
    on_policy: bool = False,
) -> tuple[Tensor, Metrics]:
    """A micro-batch's share of the step's loss.

    Args:
        logps_NC: (N, C) log-probs of the completion tokens under the trained policy, with gradient.
        old_logps_NC: the same under the policy that is clipped against; None means equal to `logps_NC` (ratio 1).
        advantages_N: (N,). mask_NC: (N, C), true at completion tokens that count.
        ref_logps_NC: needed if `config.beta` is not 0.
        entropy_NC: needed for `entropy_coef` (with gradient) and `top_entropy_quantile`; else only logged.
        sampler_logps_NC: what the sampling engine reported, needed for `sampler_correction`; without it the difference
            from the old log-probs is only logged, or with `on_policy` (the trained policy sampled) from `logps_NC`.

    Returns:
        float32 scalar, and detached sums, counts, minima and maxima for `summarise`, differences for `mismatch`.

    Raises:
        ValueError: a tensor is missing that the configuration needs, or shapes disagree.
    """
    _check_tensors(logps_NC, advantages_N, mask_NC, config, ref_logps_NC, entropy_NC, sampler_logps_NC)
    mask_NC = mask_NC.bool()
    logps_NC = _clean(logps_NC, mask_NC)
    old_NC = logps_NC.detach() if old_logps_NC is None else _clean(old_logps_NC, mask_NC).detach()
    advantages_N1 = advantages_N.float().unsqueeze(1)
    metrics: Metrics = {}

    correction_NC = None
    if sampler_logps_NC is not None:
        sampler_NC = _clean(sampler_logps_NC, mask_NC)
        scored_NC = logps_NC.detach() if on_policy else old_NC
        mismatch_NC = torch.nan_to_num(scored_NC - sampler_NC, nan=0.0)
        if config.sampler_correction:
            correction_NC = sampler_weights(old_NC - sampler_NC, mask_NC, config)
        weights_NC = mismatch_NC.exp() if correction_NC is None else correction_NC
        mismatch_metrics(metrics, mismatch_NC, weights_NC, mask_NC, config)
    ratio = _ratio(logps_NC - old_NC, mask_NC, config, metrics)
    surrogate, share_of_step = LOSSES[config.loss_type]
    tokens = Tokens(logps_NC, old_NC, ratio, advantages_N1, mask_NC, correction_NC)
    per_token = surrogate(tokens, config, metrics)
    used_NC = mask_NC
    if config.top_entropy_quantile < 1.0 and entropy_NC is not None:
        used_NC = _high_entropy(entropy_NC, mask_NC, config, normalizer)
        per_token = per_token * used_NC
    if correction_NC is not None and config.loss_type != "vespo":
        per_token = per_token * correction_NC
    if config.beta != 0.0 and ref_logps_NC is not None:
        kl_NC = kl_divergence(logps_NC, _clean(ref_logps_NC, mask_NC), config.kl_estimator)
        if config.use_bias_correction_kl:
            kl_NC = kl_NC * ratio
        per_token = per_token + config.beta * kl_NC
        mean_metric(metrics, "kl", kl_NC, mask_NC)
    loss = share_of_step(per_token * mask_NC, mask_NC, normalizer, max_completion_length)
    if entropy_NC is not None:
        entropy_NC = _clean(entropy_NC, mask_NC)
        mean_metric(metrics, "entropy", entropy_NC, mask_NC)
        if config.entropy_coef != 0.0:
            loss = loss - config.entropy_coef * _entropy_bonus(entropy_NC, used_NC, mask_NC, normalizer)
    sum_metric(metrics, "loss", loss)
    return loss, metrics


def kl_divergence(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens of the policy; d = ref - policy.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (TRL's and the GRPO paper's); http://joschu.net/blog/kl-approx.html.
    As a loss, k1 pulls nowhere in expectation unless `use_bias_correction_kl` multiplies it by the ratio.
    """
    difference = ref_logps - logps
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return torch.exp(difference) - difference - 1
    raise ValueError(f"kl_estimator {estimator!r}: choose k1, k2 or k3")


def mask_truncated(mask_NC: Tensor, truncated_N: Tensor) -> Tensor:
    """Leave completions that the length limit cut out of the loss (`mask_truncated_completions`)."""
    return mask_NC.bool() & ~truncated_N.bool().unsqueeze(1)


def _ratio(log_ratio_NC: Tensor, mask_NC: Tensor, config: LossConfig, metrics: Metrics) -> Tensor:
    """pi / pi_old per token (N, C), or the geometric mean over the tokens of each sequence (N, 1)."""
    if config.importance_sampling_level == "sequence":
        log_ratio_NC = log_ratio_NC.sum(-1, keepdim=True) / mask_NC.sum(-1, keepdim=True).clamp(min=1)
    ratio = torch.exp(log_ratio_NC)
    counted = _counted(ratio, mask_NC)
    mean_metric(metrics, "ratio/mean", ratio, counted)
    extreme_metric(metrics, "ratio/max.max", ratio, counted)
    return ratio


class Tokens(NamedTuple):
    """What a surrogate works on. `ratio` (N, C), or (N, 1) at sequence level; correction of the sampler or None."""

    logps_NC: Tensor
    old_NC: Tensor
    ratio: Tensor
    advantages_N1: Tensor
    mask_NC: Tensor
    correction_NC: Tensor | None

    @property
    def counted(self) -> Tensor:
        return _counted(self.ratio, self.mask_NC)


def _counted(ratio: Tensor, mask_NC: Tensor) -> Tensor:
    """What a mean over ratios runs over: tokens, or with sequence-level ratios sequences that have any."""
    return mask_NC if ratio.shape == mask_NC.shape else mask_NC.any(-1, keepdim=True)


# -- surrogates: loss per token (N, C), or per sequence (N, 1) with sequence-level ratios ------------------------------


def _clipped(t: Tokens, config: LossConfig, metrics: Metrics) -> Tensor:
    low, high = 1 - config.epsilon, 1 + _epsilon_high(config)
    ratio = t.ratio if config.delta is None else t.ratio.clamp(max=config.delta)
    low_hit, high_hit = (ratio < low) & (t.advantages_N1 < 0), (ratio > high) & (t.advantages_N1 > 0)
    clip_metrics(metrics, low_hit, high_hit, t.counted)
    return -torch.minimum(ratio * t.advantages_N1, t.ratio.clamp(low, high) * t.advantages_N1)


def _cispo(t: Tokens, config: LossConfig, metrics: Metrics) -> Tensor:
    high = _epsilon_high(config)
    mean_metric(metrics, "cispo_clip_ratio", (t.ratio > high) & (t.advantages_N1 > 0), t.counted)
    return -t.ratio.clamp(max=high).detach() * t.advantages_N1 * t.logps_NC


def _sapo(t: Tokens, config: LossConfig, metrics: Metrics) -> Tensor:
    temperature = torch.where(t.advantages_N1 > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return -torch.sigmoid(temperature * (t.ratio - 1)) * 4 / temperature * t.advantages_N1


def _vespo(t: Tokens, config: LossConfig, metrics: Metrics) -> Tensor:
    phi_N1 = _vespo_weight((t.logps_NC - t.old_NC).detach(), t.advantages_N1, config, t.correction_NC)
    mean_metric(metrics, "vespo/phi_seq_mean", phi_N1, t.mask_NC.any(-1, keepdim=True))
    return -phi_N1 * t.advantages_N1 * t.logps_NC


def _epsilon_high(config: LossConfig) -> float:
    return config.epsilon if config.epsilon_high is None else config.epsilon_high


def _vespo_weight(
    log_ratio_NC: Tensor, advantages_N1: Tensor, config: LossConfig, correction_NC: Tensor | None
) -> Tensor:
    """phi(w) = exp(lambda) w^k exp(-lambda w), so phi(1) = 1, of the sequence ratio w, in log space; (N, 1)."""
    log_w_N1 = log_ratio_NC.clamp(-VESPO_LOG_MAX, VESPO_LOG_MAX).sum(-1, keepdim=True)
    if correction_NC is not None:
        log_w_N1 = log_w_N1 + correction_NC.log().clamp(VESPO_LOG_MIN, VESPO_LOG_MAX).sum(-1, keepdim=True)
    log_w_N1 = log_w_N1.clamp(VESPO_LOG_MIN, VESPO_LOG_MAX)
    good = advantages_N1 >= 0
    k = torch.where(good, config.vespo_k_pos, config.vespo_k_neg)
    lam = torch.where(good, config.vespo_lambda_pos, config.vespo_lambda_neg).clamp(min=1e-4)
    return torch.exp(lam + k * log_w_N1 - lam * log_w_N1.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


#: loss type -> (its surrogate, its share of the step); config.py checks the names. Add a loss type here.
LOSSES: dict[str, tuple[Callable[[Tokens, LossConfig, Metrics], Tensor], Callable[..., Tensor]]] = {
    "grpo": (_clipped, sequence_means),
    "bnpo": (_clipped, by_step_tokens),
    "dr_grpo": (_clipped, by_full_length),
    "dapo": (_clipped, by_batch_tokens),
    "luspo": (_clipped, by_sequences),
    "cispo": (_cispo, by_batch_tokens),
    "sapo": (_sapo, sequence_means),
    "vespo": (_vespo, by_batch_tokens),
}


def _high_entropy(entropy_NC: Tensor, mask_NC: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    threshold = normalizer.entropy_threshold
    if threshold is None:
        threshold, _ = entropy_threshold([entropy_NC], [mask_NC], config.top_entropy_quantile)
    return (entropy_NC.detach() >= threshold) & mask_NC


def _entropy_bonus(entropy_NC: Tensor, used_NC: Tensor, mask_NC: Tensor, normalizer: Normalizer) -> Tensor:
    """This micro-batch's share of the mean entropy over the tokens that train."""
    total = (entropy_NC * used_NC).sum()
    if used_NC is mask_NC:
        return total / max(normalizer.tokens, 1.0)
    if normalizer.entropy_tokens is not None:
        return total / max(normalizer.entropy_tokens, 1.0)
    share = mask_NC.sum() / max(normalizer.tokens, 1.0)
    return total / used_NC.sum().clamp(min=1) * share


def _clean(values_NC: Tensor, mask_NC: Tensor) -> Tensor:
    """float32, with zeros at padding so that whatever stands there can reach neither the loss nor a gradient."""
    return torch.where(mask_NC, values_NC.float(), 0.0)


def _check_tensors(
    logps_NC: Tensor, advantages_N: Tensor, mask_NC: Tensor, config: LossConfig,
    ref_NC: Tensor | None, entropy_NC: Tensor | None, sampler_NC: Tensor | None,
) -> None:  # fmt: skip
    if logps_NC.shape != mask_NC.shape or advantages_N.shape != logps_NC.shape[:1]:
        raise ValueError(
            f"logps {tuple(logps_NC.shape)}, mask {tuple(mask_NC.shape)} and advantages {tuple(advantages_N.shape)} "
            "must be (N, C), (N, C) and (N,)"
        )
    needs = [
        (config.beta != 0.0, ref_NC, "beta needs ref_logps_NC"),
        (config.entropy_coef != 0.0, entropy_NC, "entropy_coef needs entropy_NC"),
        (config.top_entropy_quantile < 1.0, entropy_NC, "top_entropy_quantile needs entropy_NC"),
        (config.sampler_correction, sampler_NC, "sampler_correction needs sampler_logps_NC"),
    ]
    if missing := [message for needed, tensor, message in needs if needed and tensor is None]:
        raise ValueError("; ".join(missing))
