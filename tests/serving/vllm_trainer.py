"""What the checks on vLLM share: a trainer of few rows on the engine that its options name, and weights that moved."""

from __future__ import annotations

import torch

from covo_rl.audio import ClipStore
from covo_rl.config import Options
from covo_rl.engines.choose import rollout_engine
from covo_rl.engines.vllm_checks import needed_positions
from covo_rl.policy.loading import trainable_policy
from covo_rl.prompt import build_prompt
from covo_rl.run.questions import read_questions
from covo_rl.train.launch import join
from covo_rl.train.loop import Trainer


def vllm_trainer(settings: Options, *, probe_apart: bool = False) -> Trainer:
    """On 60 rows; with `probe_apart` the row that the engine is probed with is none of those that train."""
    clips, accelerator = ClipStore(), join()
    policy, trainable = trainable_policy(
        settings.model, settings.adapter, clips=clips, device=torch.device("cpu"), learning_rate=1e-3
    )
    rows = read_questions(settings, clips).train[:60]
    prompts = [build_prompt(row, policy.family, clips, settings.prompt) for row in rows]
    room = needed_positions(prompts, settings.rollout.max_completion_length, policy.family)
    engine = rollout_engine(settings, policy, trainable, max_model_len=room, probe_prompt=prompts[0])
    return Trainer(settings, policy, clips, rows[probe_apart:], accelerator, engine)


def move(made: Trainer) -> None:
    """Weights further than any update would, by a twentieth of their size: another version of the policy."""
    with torch.no_grad():
        for parameter in made.policy.parameters():
            if parameter.requires_grad:
                size = float(parameter.square().mean().sqrt()) or 0.1
                parameter.add_(0.05 * size * torch.randn_like(parameter))
    made.learner.applied += 1
