"""Points 7 and 10: what trains is what is printed and lies in the decoder; three steps move it and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from covo_rl.algo.advantage import advantages
from covo_rl.algo.loss import policy_loss
from covo_rl.algo.normalizer import Normalizer
from covo_rl.config import LossConfig, PromptConfig, RolloutConfig
from covo_rl.engines.own import sample
from covo_rl.policy.patterns import part_of
from covo_rl.prompt import build_prompt
from covo_rl.run.conformance.outcome import Figure, Gap
from covo_rl.run.conformance.subject import LIGHT, RATE, Subject, largest_difference, relative_difference
from covo_rl.synth import RATE as BUILTIN_RATE
from covo_rl.synth import samples
from covo_rl.types import Clip, Example, Group, Prompt, RewardTable

STEPS, PROMPTS, GENERATIONS, LENGTH = 3, 2, 4, 8
LOSS = LossConfig(loss_type="grpo")


# -- 7. targets --------------------------------------------------------------------------------------------------------


def targets(subject: Subject) -> Iterator[Figure | Gap]:
    """Adapted modules = printed targets, inside the decoder; recomputation changes no gradient; no graph outside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    family, printed = subject.family, set(subject.trainable.targets)
    adapted = {name for name, module in family.model.named_modules() if isinstance(module, BaseTunerLayer)}
    odd = sorted(adapted ^ printed)
    yield Figure("modules adapted or printed, not both", len(odd), 0, f"PEFT resolves the pattern otherwise: {odd[:2]}")
    outside = [name for name in adapted if part_of(name, family) != "llm"]
    yield Figure("adapted modules outside the decoder", len(outside), 0, f"{outside[:2]}: name full modules to PEFT")
    yield Figure("adapted modules", len(adapted), 1, "no Linear lies inside the decoder's layers", least=True)
    clip = family.clip_features(subject.wave(3, 0.5), RATE)
    graph = family.encode([clip])[0].requires_grad
    yield Figure("frozen encoders that make a graph", int(graph), 0, "something of it still asks for gradients")
    yield from _recomputation(subject)


def _recomputation(subject: Subject) -> Iterator[Figure | Gap]:
    groups = [group for group in subject.groups if subject.nbytes <= LIGHT or not group.prompt.clip_keys]
    weights = subject.weights(groups)
    plain_logps = subject.packed_logps(groups)
    plain = subject.gradients(plain_logps, weights)
    with subject.recomputing():
        logps = subject.packed_logps(groups)
        again = subject.gradients(logps, weights)
    limit = 1e-6 if subject.dtype == torch.float32 else subject.exact_gradient
    yield Figure("gradients with recomputation, relative difference", relative_difference(again, plain), limit,
                 "a layer gives another result the second time (dropout, state)")  # fmt: skip
    difference = largest_difference([row.detach() for row in logps], [row.detach() for row in plain_logps])
    yield Figure("log-probs in training mode, difference", difference, subject.exact, "dropout in the decoder")


# -- 10. three steps ---------------------------------------------------------------------------------------------------


def steps(subject: Subject) -> Iterator[Figure | Gap]:
    """GRPO on rows of the built-in set: the loss is finite, LoRA moves, and no other parameter changes by a bit."""
    policy, model = subject.policy, subject.family.model
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before, start = checksums(frozen), {name: p.detach().clone() for name, p in subject.adapter.items()}
    optimizer = torch.optim.AdamW(list(subject.adapter.values()), lr=1e-3, weight_decay=0.0)
    prompts = builtin_prompts(subject)
    losses, informative = [], 0
    for step in range(STEPS):
        groups, count = sampled(subject, prompts, seed=step)
        with subject.thrift():
            loss = step_loss(subject, groups)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        informative += count
    policy.eval()
    yield Figure("losses that are not finite", sum(not np.isfinite(loss) for loss in losses), 0, f"they are {losses}")
    yield Figure(f"groups with variance of {STEPS * PROMPTS}", informative, 1,
                 "all completions of a prompt are the same", least=True)  # fmt: skip
    still = [name for name, value in start.items() if torch.equal(value, subject.adapter[name].detach())]
    yield Figure("LoRA matrices that stayed", len(still), 0, f"no gradient reaches {still[:2]}")
    after = checksums(frozen)
    changed = [name for name in frozen if before[name] != after[name]]
    yield Figure("frozen parameters that changed", len(changed), 0, f"{changed[:2]} are updated in place")


def builtin_prompts(subject: Subject) -> list[Prompt]:
    """The first questions of the built-in set; nothing is written."""
    rows = []
    for row, wave in samples("train", PROMPTS):
        clip = Clip(array=wave.astype(np.float32) / 2**15, sampling_rate=BUILTIN_RATE)
        rows.append(Example(row["id"], (clip,), row["question"], tuple(row["choices"]), row["answer"]))
    return [build_prompt(row, subject.family, subject.clips, PromptConfig(instruction="")) for row in rows]


def sampled(subject: Subject, prompts: Sequence[Prompt], *, seed: int) -> tuple[list[Group], int]:
    """Groups of a step, and how many of them have any variance."""
    policy = subject.policy
    rollout = RolloutConfig(num_generations=GENERATIONS, max_completion_length=LENGTH)
    policy.eval()
    with torch.no_grad():
        groups = sample(policy, prompts, policy.features(prompts), rollout, seed=seed)
    return groups, int(advantages(reward_table(groups), LOSS).informative_P.sum())


def step_loss(subject: Subject, groups: Sequence[Group]) -> torch.Tensor:
    """The loss of these groups, on policy."""
    policy = subject.policy
    policy.train()
    scored = policy("logps", groups, policy.features([group.prompt for group in groups]))
    advantages_PG = advantages(reward_table(groups), LOSS).advantages_PG
    lengths = [len(rollout.completion_ids) for group in groups for rollout in group.rollouts]
    loss, _ = policy_loss(
        scored.logps_NC, None, torch.from_numpy(advantages_PG.ravel()).float().to(scored.logps_NC.device),
        scored.mask_NC, LOSS, normalizer=Normalizer.from_lengths(lengths), max_completion_length=LENGTH,
    )  # fmt: skip
    return loss


def reward_table(groups: Sequence[Group]) -> RewardTable:
    """Arithmetic on a completion's ids, so that a model that writes noise has something to learn from."""
    rewards_PG = np.array([[np.mean(np.array(r.completion_ids) % 8) / 7 for r in group.rollouts] for group in groups])
    return RewardTable(("ids",), np.ones(1), rewards_PG[..., None], rewards_PG)


def checksums(parameters: dict[str, Any]) -> dict[str, int]:
    """A sum over the bits of each, without a copy of it."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: int(p.detach().view(views[p.element_size()]).sum(dtype=torch.int64)) for name, p in
            parameters.items()}  # fmt: skip
