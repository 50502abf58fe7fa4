"""What can be known of a run before its model is loaded: rewards, judge, adapter, and the kind of model."""

from __future__ import annotations

from covo_rl.config import ConfigError, Options
from covo_rl.models import model_config
from covo_rl.policy.saved_adapter import read_adapter
from covo_rl.policy.trainable import quantization_kwargs
from covo_rl.resolve import resolve_model
from covo_rl.rewards import components
from covo_rl.rewards.judge import judge_from_spec


def check_before_loading(options: Options) -> None:
    """Everything about the options that needs neither data nor weights.

    Raises:
        ConfigError, RewardError, AdapterError, ModelError, OSError: what is wrong, and what exists instead.
    """
    reward, adapter = options.reward, options.adapter
    names = [term.name for term in components(reward.rewards)]
    if reward.reward_gate not in ("none", *names):
        raise ConfigError([f"reward_gate {reward.reward_gate!r} is not among the rewards: {', '.join(names)}"])
    if reward.judge:
        judge_from_spec(reward.judge)
    if adapter.load_in_4bit:
        quantization_kwargs()
    model_config(resolve_model(options.model.model))
    if adapter.adapter:
        read_adapter(adapter.adapter)
