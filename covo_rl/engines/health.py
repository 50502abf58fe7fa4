"""The start-up check on the real model: rollouts equal scoring, and the policy hears the audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from covo_rl.config import RolloutConfig
from covo_rl.engines.own import sample, samples_exactly
from covo_rl.policy.features import Features
from covo_rl.policy.policy import Policy
from covo_rl.types import Prompt, UserError

#: float32 bound on |sampling - scoring|; issue and tests hold tiny models to 1e-5, deep ones round more
TOLERANCE = 1e-4
GENERATIONS = 2
LENGTH = 32


class SelfCheckError(UserError, RuntimeError):
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
    features = policy.features(prompts)

    def logps_M(heard: Features) -> torch.Tensor:
        scored = policy("logps", groups, heard, temperature=config.temperature)
        return scored.logps_NC[scored.mask_NC].cpu()

    with torch.no_grad():
        groups = sample(policy, prompts, features, config, seed=seed)
        scored_M = logps_M(features)
        sampled_M = torch.tensor([logp for group in groups for rollout in group.rollouts for logp in rollout.logps])
        embeddings = {key: value for key, value in features.get().items() if key in features.keys}
        silence = {key: torch.zeros_like(value) for key, value in embeddings.items()}
        without, swapped = (
            float((logps_M(Features(list(heard), lambda keys, heard=heard: heard)) - scored_M).abs().max())
            if heard
            else None
            for heard in (silence, _swapped(embeddings))
        )
    difference, exact = float((scored_M - sampled_M).abs().max()), samples_exactly(policy)
    if not bool(torch.isfinite(scored_M).all()):
        raise SelfCheckError("self-check: the scoring pass gives log-probs that are not finite; check the weights")
    if exact and difference > TOLERANCE:
        raise SelfCheckError(
            f"self-check: sampling and scoring differ by {difference:.2e} nats, above {TOLERANCE:.0e}. The decoder "
            "probably keeps state that the packed pass does not see"
        )
    for name, change in (("removing", without), ("swapping", swapped)):
        if change == 0.0:
            raise SelfCheckError(f"self-check: {name} the audio changes no log-prob, so the policy does not hear it")
    return SelfCheck(len(prompts), difference, TOLERANCE if exact else None, without, swapped)


def _swapped(embeddings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every clip gets the features of the next one, repeated or cut to its own slots; nothing for a single clip."""
    keys = list(embeddings) if len(embeddings) > 1 else []
    swapped = {}
    for key, other in zip(keys, keys[1:] + keys[:1], strict=True):
        slots, features = embeddings[key].shape[0], embeddings[other]
        swapped[key] = features.repeat(-(-slots // features.shape[0]), 1)[:slots]
    return swapped
