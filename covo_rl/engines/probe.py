"""Does the engine run the policy? Its log-probs of a few tokens against the policy's own, after every sync.

This catches an adapter that is a silent no-op, one that is served stale, features of an encoder that has changed since,
buffers lost in sleep. A fresh LoRA is zero, so at the start the same is asked of a policy with random weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from covo_rl.config import RolloutConfig
from covo_rl.engines.base import EngineError, RolloutEngine, Sampler
from covo_rl.engines.own import samples_exactly
from covo_rl.policy.sharding import every_rank, local_tensor, put, whole
from covo_rl.types import Group, Prompt, Rollout, visible

if TYPE_CHECKING:
    from torch import nn

    from covo_rl.policy.policy import Policy

#: of a completion: the first token alone says little once every answer begins alike
TOKENS = 16
EXACT, COARSE = 1e-4, 0.3  # nats, in float32 and in 16 bits
#: of the policy with random weights; no update makes it
START_VERSION = 1 << 30
#: random weights change a log-prob by as many tolerances, so that an engine without them is told from one with them
EFFECT = 4.0
SCALES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the noise on a tensor, in units of its root mean square
ZERO_SCALE = 0.1  # in place of that for a tensor of zeros
FIXED_TEXT = "Two sounds follow one another; the second is louder."


class Probe:
    """Compares on one prompt, which should have a clip, with completions of at most `tokens`.

    `tolerance` in nats; 0 means 1e-4 where policy and engine, which computes in `dtype` (default: as the policy), are
    in float32, else 0.3. Where the policy is sharded over ranks every method is a collective.
    """

    def __init__(
        self, policy: Policy, prompt: Prompt, tolerance: float = 0.0, *, dtype: torch.dtype | None = None,
        tokens: int = TOKENS,
    ) -> None:  # fmt: skip
        self.policy, self.prompt, self._tolerance, self.dtype = policy, prompt, tolerance, dtype
        self.config = RolloutConfig(num_generations=1, max_completion_length=tokens, temperature=1.0)

    @property
    def tolerance(self) -> float:
        if self._tolerance:
            return self._tolerance
        exact = samples_exactly(self.policy) and self.dtype in (None, torch.float32)
        return EXACT if exact else COARSE

    def check(self, engine: Sampler, version: int) -> float:
        """The largest absolute difference, in nats, over the engine's own greedy completion of the prompt.

        Raises:
            EngineError: it is above the tolerance, or the engine cannot sample.
        """
        try:
            group, failure = self._completion(engine, version), None
        except EngineError as error:
            if not self.policy.sharded:
                raise
            group, failure = self._group(self.policy.family.eos_token_ids[:1]), error  # other ranks wait in the pass
        (rollout,) = group.rollouts
        differences = [abs(ours - theirs) for ours, theirs in zip(self._logps(group), rollout.logps, strict=True)]
        if failure:
            raise failure
        largest = max(math.inf if math.isnan(difference) else difference for difference in differences)
        if not largest <= self.tolerance:
            at = next(i for i, difference in enumerate(differences) if not difference <= self.tolerance)
            raise EngineError(
                f"the engine does not run the policy: at version {version} its log-probs of {len(differences)} greedy "
                f"ids on row {visible(self.prompt.example.id)} differ from the policy's by up to {largest:.3g} nats, "
                f"from id {at} on; engine_probe_tolerance is {self.tolerance:g}. An adapter that is not applied or is "
                "an older one, stale caches, another base model or precision do that (docs/rollouts.md)"
            )
        return largest

    def _completion(self, engine: Sampler, version: int) -> Group:
        pending = engine.submit([self.prompt], self.config, seed=0, generations=1, greedy=True)
        groups = engine.collect(pending)
        if not groups:
            raise EngineError(f"the engine cannot sample: {'; '.join(failed.reason for failed in engine.failed)}")
        if pending.version != version:
            raise EngineError(f"the engine sampled with version {pending.version}, {version} was synced")
        return groups[0]

    def _group(self, ids: Sequence[int]) -> Group:
        return Group(self.prompt, (Rollout(tuple(ids), (0.0,) * len(ids), "", "length"),))

    def _logps(self, group: Group) -> list[float]:
        """The policy's log-probs of the group's only completion."""
        with torch.no_grad():
            scored = self.policy("logps", [group], self.policy.features([self.prompt]), temperature=1.0)
        return scored.logps_NC[0][scored.mask_NC[0]].tolist()

    def check_random(self, engine: RolloutEngine) -> float:
        """`check` of the policy with seeded random weights in place of what trains, which is then put back bit for bit.

        The engine is left with the random ones: `sync` it.

        Raises:
            EngineError: as `check`, or no such weights change the policy's answers enough to be told apart.
        """
        if not any(p.requires_grad for p in self.policy.family.model.parameters()):
            return 0.0  # it only answers, with an adapter that is none of zeros: `check` is enough
        fixed = self._group(self.policy.family.tokenizer(FIXED_TEXT, add_special_tokens=False)["input_ids"][:TOKENS])
        before = self._logps(fixed)
        with weight_noise(self.policy.family.model) as draw:
            for scale in SCALES:
                draw(scale)
                changes = [abs(a - b) for a, b in zip(before, self._logps(fixed), strict=True)]
                effect = min(every_rank(max(changes)))  # of one mind about the scale
                if effect >= EFFECT * self.tolerance:  # False for NaN
                    return self._synced(engine)
        raise EngineError(
            f"random weights in place of those that train change the policy's log-probs by {effect:.2g} nats at most, "
            f"too little to be told from engine_probe_tolerance {self.tolerance:g}: lower that"
        )

    def _synced(self, engine: RolloutEngine) -> float:
        report = engine.sync(START_VERSION)
        return self.check(engine, START_VERSION) if report.probe_abs is None else report.probe_abs


@contextmanager
def weight_noise(model: nn.Module) -> Iterator[Callable[[float], None]]:
    """Yields `draw(scale)`, which adds noise of that share to everything that trains; bit for bit as before at the end.

    The same on every rank and in every run. A collective under ZeRO-3.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    originals = [whole(p).cpu() if hasattr(p, "ds_id") else local_tensor(p).detach().cpu().clone() for p in trained]

    def draw(scale: float) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter, original in zip(trained, originals, strict=True):
            size = float(original.float().square().mean().sqrt()) or ZERO_SCALE
            noise = torch.randn(original.shape, generator=generator) * (scale * size)
            put(parameter, original + noise.to(original.dtype))

    try:
        yield draw
    finally:
        for parameter, original in zip(trained, originals, strict=True):
            put(parameter, original)
