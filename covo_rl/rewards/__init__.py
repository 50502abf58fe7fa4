"""Rewards: R_total = R_accuracy + R_format + R_consistency + R_thinking, or whatever functions a run names.

    load_reward("accuracy")               a reward function by name
    score(groups, config) -> RewardTable  all of them, with time limits; a failure is explained, never a zero
    lint(names, examples)                 is a reward fit to train on?

A reward function has TRL's signature, `f(prompts, completions, **columns) -> list[float | None]`, with scores in
[0, 1]; None is "not gradeable". docs/rewards.md lists the columns.
"""

from covo_rl.rewards.linter import Finding, lint
from covo_rl.rewards.scoring import Component, Scoring, components, score
from covo_rl.rewards.specs import Reward, RewardError, available_rewards, load_reward

__all__ = [
    "Component", "Finding", "Reward", "RewardError", "Scoring", "available_rewards", "components", "lint",
    "load_reward", "score",
]  # fmt: skip
