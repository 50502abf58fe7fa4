"""Policy gradients of when to stop, from one forward per stream: the objective is J = sum over stops P(stop) R(stop).

    sampled   G stops, advantage (R - mean) / (std + 1e-4) within the group; plain GRPO, the reference
    exact     every stop, weighted by its probability, advantage (R - m) / (s + 0.02): G to infinity at the same cost
    trunk     every decision of the forward: what stopping there earns against what waiting is still worth
    mix       exact + 0.1 trunk

A rollout's log-probs are summed, not averaged over its decisions: a mean would weaken the late, patient rollouts. The
user does not depend on a model that listens, so one forward holds every decision state that a rollout could reach, and
V_k, the worth of waiting, is a sum and needs no critic:

    V_K = R(never),  V_k = h_k R(k) + (1 - h_k) V_(k+1),   loss = - sum_k w_k c_k (R(k) - V_(k+1)) z_k

With w_k = P(reach k) and c_k = h_k (1 - h_k) that is the gradient of J. Where h is near 0 or 1 it would teach nothing:
`unsaturated` takes w_k = (P(reach k) + 1) / 2 and for c_k the slope of the log-prob of what is better, 1 - h_k of
stopping and h_k of going on: a sure mistake moves z as much as it can, and a sure right decision no more, which a
constant slope would push without end. Then `hindsight` is the part of V in whose place the best reward still to be had
stands, which who made the stream knows: it teaches patience also where the policy would spoil the rest, and so more of
it than pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from covo_rl.algo.advantage import ZERO_STD, by_sum
from covo_rl.duplex.rollout import stop_logps

#: what is added to the exact standard deviation of a stream's rewards
EXACT_EPS = 0.02


@dataclass(frozen=True)
class TimingOptions:
    """`generations` G for `sampled`; `trunk_weight` for `mix`; `beta` times the KL to the start policy.

    `scale`: advantages are divided by the deviation of a stream's rewards. Without it, and without `unsaturated`, each
    estimator's expectation is the gradient of J, `sampled` times (G - 1) / G.
    """

    timing_estimator: str = "mix"
    generations: int = 16
    trunk_weight: float = 0.1
    beta: float = 0.001
    scale: bool = True
    unsaturated: bool = True
    hindsight: float = 0.5

    def __post_init__(self) -> None:
        problems = []
        if self.timing_estimator not in ESTIMATORS:
            problems.append(f"timing_estimator {self.timing_estimator!r}: choose {', '.join(ESTIMATORS)}")
        if self.generations < 2:
            problems.append(f"generations {self.generations}: a group needs 2 or more")
        problems += [f"{name} {value}: must be 0 or more" for name in ("trunk_weight", "beta")
                     if not (value := getattr(self, name)) >= 0]  # fmt: skip
        if not 0 <= self.hindsight <= 1:
            problems.append(f"hindsight {self.hindsight}: must be in [0, 1]")
        if problems:
            raise ValueError("; ".join(problems))


def sampled_loss(z_K: Tensor, total_S: Tensor, stops_PG: np.ndarray, *, scale: bool = True) -> Tensor:
    """GRPO over P groups of G stops of one stream: -(1 / PG) sum A log P(stop). A group without variance gives 0."""
    advantages_PG, _ = by_sum(total_S.double().cpu().numpy()[stops_PG], "group" if scale else "none")
    logps_PG = stop_logps(z_K)[torch.as_tensor(stops_PG, device=z_K.device)]
    return -(torch.as_tensor(advantages_PG, device=z_K.device).to(z_K.dtype) * logps_PG).mean()


def exact_loss(z_K: Tensor, total_S: Tensor, *, scale: bool = True) -> Tensor:
    """The mean over all stops of A log P, with the exact mean and, for `scale`, deviation of the rewards."""
    logps_S = stop_logps(z_K)
    probs_S = logps_S.detach().exp()
    mean, std = _moments(probs_S, total_S)
    advantages_S = (total_S - mean) / (std + EXACT_EPS) if scale else total_S - mean
    return -(probs_S * advantages_S * logps_S).sum()


def waiting_values(h_K: Tensor, total_S: Tensor) -> Tensor:
    """V (K + 1,): what a rollout that has reached decision k earns on average; V_K is the reward of never."""
    values = [total_S[-1]]
    for hazard, reward in zip(h_K.flip(0), total_S[:-1].flip(0), strict=True):
        values.append(hazard * reward + (1 - hazard) * values[-1])
    return torch.stack(values[::-1])


def trunk_loss(z_K: Tensor, total_S: Tensor, *, unsaturated: bool = True, hindsight: float = 0.5) -> Tensor:
    """The loss over every decision; its gradient is that of -J unless `unsaturated`, with which `hindsight` counts."""
    with torch.no_grad():
        h_K = z_K.sigmoid()
        reach_K = torch.cat([h_K.new_zeros(1), F.logsigmoid(-z_K[:-1]).cumsum(0)]).exp()
        slope_K, waiting_K = h_K * (1 - h_K), waiting_values(h_K, total_S)[1:]
        gain_K = total_S[:-1] - waiting_K
        if unsaturated:
            best_S = total_S.flip(0).cummax(0).values.flip(0)
            gain_K += hindsight * (waiting_K - best_S[1:])
            reach_K, slope_K = (reach_K + 1) / 2, torch.where(gain_K > 0, 1 - h_K, h_K)
        weight_K = reach_K * slope_K * gain_K
    return -(weight_K * z_K).sum()


def hazard_kl(z_K: Tensor, reference_K: Tensor) -> Tensor:
    """sum_k KL(h_k || h_ref,k) in nats, exact for a choice of two; differentiable in `z_K`."""
    stop_K = F.logsigmoid(z_K) - F.logsigmoid(reference_K)
    on_K = F.logsigmoid(-z_K) - F.logsigmoid(-reference_K)
    return (z_K.sigmoid() * stop_K + (-z_K).sigmoid() * on_K).sum()


def gold_loss(z: Sequence[Tensor], stops: Sequence[int]) -> Tensor:
    """-log P of the stop that somebody prescribes, the mean over streams: supervised updates, to compare with."""
    return -torch.stack([stop_logps(z_K)[stop] for z_K, stop in zip(z, stops, strict=True)]).mean()


Estimator = Callable[[Tensor, Tensor, np.ndarray, TimingOptions], Tensor]


def _sampled(z_K: Tensor, total_S: Tensor, stops_G: np.ndarray, options: TimingOptions) -> Tensor:
    return sampled_loss(z_K, total_S, stops_G[None], scale=options.scale)


def _exact(z_K: Tensor, total_S: Tensor, stops_G: np.ndarray, options: TimingOptions) -> Tensor:
    return exact_loss(z_K, total_S, scale=options.scale)


def _trunk(z_K: Tensor, total_S: Tensor, stops_G: np.ndarray, options: TimingOptions) -> Tensor:
    return trunk_loss(z_K, total_S, unsaturated=options.unsaturated, hindsight=options.hindsight)


def _mix(z_K: Tensor, total_S: Tensor, stops_G: np.ndarray, options: TimingOptions) -> Tensor:
    exact = _exact(z_K, total_S, stops_G, options)
    return exact + options.trunk_weight * _trunk(z_K, total_S, stops_G, options)


ESTIMATORS: dict[str, Estimator] = {"sampled": _sampled, "exact": _exact, "trunk": _trunk, "mix": _mix}


def timing_loss(
    z: Sequence[Tensor], totals: Sequence[np.ndarray], stops: Sequence[np.ndarray], options: TimingOptions,
    references: Sequence[Tensor] | None = None, earned: Sequence[np.ndarray] | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """The mean over streams of the estimator's loss + beta KL, and figures for the log, means over streams as well.

    `z` one (K,) per stream; `totals` their rewards (K + 1,), never last; `stops` (G,) those of rollouts, which only
    `sampled` learns from; `references` the start policy's z. `earned`: in place of `totals`, where more is known of the
    stops that were drawn, which `sampled` alone may learn from; the figures are those of `totals`.

    Raises:
        ValueError: no streams; rewards that do not fit or are not finite; beta without references.
    """
    if not z or len(totals) != len(z) or (options.beta and (references is None or len(references) != len(z))):
        raise ValueError(f"{len(z)} streams, {len(totals)} rewards, {len(references or ())} references: there must be "
                         "one or more streams, with rewards each and, unless beta is 0, a reference")  # fmt: skip
    losses, kls, rewards, deviations = [], [], [], []
    for i, (z_K, total_S) in enumerate(zip(z, totals, strict=True)):
        if total_S.shape != (len(z_K) + 1,) or not np.isfinite(total_S).all():
            raise ValueError(f"stream {i} has {len(z_K)} decisions and rewards {total_S.shape}, finite: "
                             f"{bool(np.isfinite(total_S).all())}; each decision needs one, and never")  # fmt: skip
        scores_S = torch.as_tensor(total_S, device=z_K.device, dtype=z_K.dtype)
        learnt_S = scores_S if earned is None else torch.as_tensor(earned[i], device=z_K.device, dtype=z_K.dtype)
        losses.append(ESTIMATORS[options.timing_estimator](z_K, learnt_S, stops[i], options))
        if references is not None:
            kls.append(hazard_kl(z_K, references[i].detach()))
        mean, std = _moments(stop_logps(z_K.detach()).exp(), scores_S)
        rewards.append(float(mean))
        deviations.append(float(std))
    loss = torch.stack(losses).mean()
    metrics = {
        "timing_loss": float(loss.detach()), "reward": float(np.mean(rewards)),
        "reward_std": float(np.mean(deviations)),
        "groups_without_variance": float(np.mean([np.ptp(total_S) <= ZERO_STD for total_S in totals])),
    }  # fmt: skip
    if kls:
        metrics["kl"] = float(torch.stack(kls).mean().detach())
        loss = loss + options.beta * torch.stack(kls).mean()
    return loss, metrics


def _moments(probs_S: Tensor, total_S: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the rewards under these probabilities."""
    mean = (probs_S * total_S).sum()
    return mean, (probs_S * (total_S - mean) ** 2).sum().sqrt()
