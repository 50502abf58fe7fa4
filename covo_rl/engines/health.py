"""The start-up check on the real model: rollouts equal scoring, and the policy hears the audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from covo_rl.config import RolloutConfig
from covo_rl.engines.own import sample, samples_exactly
from covo_rl.policy.features import Features
from covo_rl.policy.policy import Policy
from covo_rl.types import Group, Prompt

#: float32 bound on |sampling - scoring|; issue and tests hold tiny models to 1e-5, deep ones round more
TOLERANCE = 1e-4
GENERATIONS = 2
LENGTH = 32


class SelfCheckError(RuntimeError):
    """Training on this model would be wrong; the message says what differs."""


@dataclass(frozen=True)
class SelfCheck:
    """Largest absolute differences in nats over all sampled ids.

    `sampling_vs_scoring` is held to `tolerance` in float32; in lower precision it is information only. None for
    the audio entries means that no prompt has audio, or that there is no second clip to swap with.
    """

    prompts: int
    sampling_vs_scoring: float
    tolerance: float | None
    without_audio: float | None
    swapped_audio: float | None


def self_check(
    policy: Policy, prompts: Sequence[Prompt], config: RolloutConfig | None = None, *, seed: int = 0
) -> SelfCheck:
    """Sample a little, score it, and score it again without and with somebody else's audio.

    Raises SelfCheckError where float32 sampling and scoring differ by more than the tolerance, where a log-prob is
    not finite, or where the audio changes nothing.
    """
    config = config or RolloutConfig()
    config = replace(
        config, num_generations=GENERATIONS, max_completion_length=min(LENGTH, config.max_completion_length)
    )
    with torch.no_grad():
        features = policy.features(prompts)
        groups = sample(policy, prompts, features, config, seed=seed)
        scored = policy("logps", groups, features, temperature=config.temperature)
        sampled = torch.tensor([lp for group in groups for r in group.rollouts for lp in r.logps])
        logps_M = scored.logps_NC[scored.mask_NC].cpu()
        difference = float((logps_M - sampled).abs().max())
        changes = {
            name: _change(policy, groups, embeddings, config.temperature, logps_M)
            for name, embeddings in (("without", _zeros(features)), ("swapped", _swapped(prompts, features)))
        }
    exact = samples_exactly(policy)
    report = SelfCheck(len(prompts), difference, TOLERANCE if exact else None, changes["without"], changes["swapped"])
    _assert(report, logps_M)
    return report


def _assert(report: SelfCheck, logps_M: torch.Tensor) -> None:
    if not bool(torch.isfinite(logps_M).all()):
        raise SelfCheckError("self-check: the scoring pass gives log-probs that are not finite; check the weights")
    if report.tolerance is not None and report.sampling_vs_scoring > report.tolerance:
        raise SelfCheckError(
            f"self-check: sampling and scoring differ by {report.sampling_vs_scoring:.2e} nats, above "
            f"{report.tolerance:.0e}. The decoder probably keeps state that the packed pass does not see"
        )
    for name, change in (("removing", report.without_audio), ("swapping", report.swapped_audio)):
        if change is not None and change == 0.0:
            raise SelfCheckError(f"self-check: {name} the audio changes no log-prob, so the policy does not hear it")


def _change(
    policy: Policy,
    groups: Sequence[Group],
    embeddings: dict[str, torch.Tensor] | None,
    temperature: float,
    logps_M: torch.Tensor,
) -> float | None:
    if embeddings is None:
        return None
    features = Features(list(embeddings), lambda keys: {key: embeddings[key] for key in keys})
    scored = policy("logps", groups, features, temperature=temperature)
    return float((scored.logps_NC[scored.mask_NC].cpu() - logps_M).abs().max())


def _zeros(features: Features) -> dict[str, torch.Tensor] | None:
    return {key: torch.zeros_like(value) for key, value in features.get().items()} or None


def _swapped(prompts: Sequence[Prompt], features: Features) -> dict[str, torch.Tensor] | None:
    """Every clip gets the features of the next one, repeated or cut to its own slots."""
    known = features.get()
    keys = list(dict.fromkeys(key for prompt in prompts for key in prompt.clip_keys))
    if len(keys) < 2:
        return None
    result = {}
    for key, other in zip(keys, keys[1:] + keys[:1], strict=True):
        slots = known[key].shape[0]
        repeats = -(-slots // known[other].shape[0])
        result[key] = known[other].repeat(repeats, 1)[:slots]
    return result
