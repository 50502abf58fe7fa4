"""The policy as its own engine: G completions per prompt from one prefill, log-probs equal to the scoring pass.

    groups = sample(policy, prompts, policy.features(prompts), config, seed=1)

A prompt's rollouts depend on the weights, the seed, and the prompt (row id, ids, clips) alone: not on the rest of
the batch, nor on the number of ranks. The recorded log-probs are those of softmax(logits / temperature) *before*
top-k, top-p or min-p, and equal `policy.logps(..., temperature)` (1e-5 in float32).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.engines.base import Failed, Pending, SyncReport, TextDecoder, check_groups, rollout_of
from covo_rl.engines.decoding import sample_draws
from covo_rl.types import Group, Prompt

if TYPE_CHECKING:
    from torch import nn

    from covo_rl.config import RolloutConfig
    from covo_rl.policy.features import Features
    from covo_rl.policy.policy import Policy


class OwnEngine:
    """Samples with the policy itself, in line: `collect` does the work, and `sync` has nothing to move.

    With `ahead` it is `submit` that does it, before an update changes the policy: what an engine of its own memory
    samples meanwhile, at the same lag.

    `wrapped` is the policy as accelerate returned it, where parameters live in pieces that its hooks gather.
    `full_precision` False says that a wrapper casts what the policy holds in float32. With `keep_prompts` the prompts'
    keys stay for `Policy.old_logps` until `rest`, where log-probs are not exact and that pass is needed.
    """

    name = "own"
    failed: Sequence[Failed] = ()

    def __init__(
        self,
        policy: Policy,
        wrapped: nn.Module | None = None,
        *,
        full_precision: bool = True,
        keep_prompts: bool = False,
        ahead: bool = False,
    ) -> None:
        self.policy = policy
        self.model = policy if wrapped is None else wrapped
        self.full_precision = full_precision
        self.keep_prompts = keep_prompts and not ahead
        self.ahead = ahead
        self.version = 0
        self.seconds: dict[str, float] = {}

    @property
    def exact(self) -> bool:
        return self.full_precision and samples_exactly(self.policy)

    def sync(self, version: int) -> SyncReport:
        self.version = version
        return SyncReport(version)

    def submit(
        self, prompts: Sequence[Prompt], config: RolloutConfig, *, seed: int, generations: int, greedy: bool = False
    ) -> Pending:
        prompts, version = tuple(prompts), self.version

        def work() -> list[Group]:
            start = time.perf_counter()
            with torch.no_grad():
                features = self.policy.features(prompts)
            encoded = time.perf_counter()
            groups = sample(
                self.model, prompts, features, config, seed=seed, num_generations=generations, greedy=greedy,
                keep_prompts=self.keep_prompts and not self.exact, version=version,
            )  # fmt: skip
            self.seconds = {"encode": encoded - start, "sample": time.perf_counter() - encoded}
            return groups

        return Pending(prompts, generations, version, work() if self.ahead else work)

    def collect(self, pending: Pending) -> list[Group]:
        groups = pending.work if self.ahead else pending.work()
        # the policy is the engine: what is not finite here is not finite in the update, whose guard reports it
        check_groups(groups, pending, self.policy.family, finite=False)
        return groups

    def rest(self) -> None:
        self.policy.release()

    def close(self) -> None:
        self.rest()

    def metrics(self) -> Mapping[str, float]:
        """Seconds of the last collection: encoding the clips, sampling."""
        return {f"{phase}_s": seconds for phase, seconds in self.seconds.items()}


def samples_exactly(policy: Policy) -> bool:
    """Sampling log-probs equal the scoring pass (1e-5): float32 weights, no TF32, no autocast seen while sampling."""
    whole = torch.get_float32_matmul_precision() == "highest" and not policy.autocast_seen
    return whole and {p.dtype for p in policy.family.decoder.parameters()} == {torch.float32}


def sample(
    policy: nn.Module,
    prompts: Sequence[Prompt],
    features: Features,
    config: RolloutConfig,
    *,
    seed: int,
    greedy: bool = False,
    num_generations: int | None = None,
    keep_prompts: bool = False,
    version: int = 0,
) -> list[Group]:
    """One group per prompt, in order. `policy` may be wrapped (DDP, FSDP2); sharded ones must be.

    `num_generations` overrides the config's; `greedy` takes the likeliest token. `keep_prompts` lets a following
    `policy.old_logps` reuse the prompts' keys. `version` is noted in every rollout.
    """
    generations = num_generations or config.num_generations
    draws = policy(
        sample_draws, prompts, features, config, seed=seed, generations=generations, greedy=greedy,
        keep_prompts=keep_prompts,
    )  # fmt: skip
    family: Any = getattr(policy, "module", policy).family
    decoder = TextDecoder(family)
    lengths, stopped = draws.lengths_N.tolist(), draws.stopped_N.tolist()
    all_ids, all_logps = draws.ids_NC.tolist(), draws.logps_NC.tolist()
    rollouts = [
        rollout_of(ids[:length], logps[:length], "stop" if stop else "length", decoder, version)
        for ids, logps, length, stop in zip(all_ids, all_logps, lengths, stopped, strict=True)
    ]
    return [Group(prompt, tuple(rollouts[p * generations : (p + 1) * generations])) for p, prompt in enumerate(prompts)]
