"""What can be known of a run before its model is loaded: rewards, judge, adapter, parts, and the kind of model."""

from __future__ import annotations

from covo_rl.config import AdapterConfig, ConfigError, ModelConfig, Options, RewardConfig, number_map
from covo_rl.models import family_at, use_family
from covo_rl.models.builtin import resolve_model
from covo_rl.models.quantised import check_quantisation
from covo_rl.policy.patterns import check_parts, module_regex
from covo_rl.policy.saved_adapter import read_adapter
from covo_rl.records.trackers import installed_trackers
from covo_rl.rewards import components
from covo_rl.rewards.judge import judge_from_spec
from covo_rl.run.report.replies import decoder_codes
from covo_rl.train.batch import check_policy_ids
from covo_rl.types import UserError


def check_before_loading(options: Options) -> None:
    """Everything about the options that needs neither data nor weights.

    Raises:
        ConfigError, RewardError, AdapterError, ModelError, OSError: what is wrong, and what exists instead; ConfigError
            for several of them.
    """
    adapter, judge = options.adapter, options.reward.judge
    checks = [
        lambda: _check_rewards(options.reward),
        lambda: judge and judge_from_spec(judge, options.reward.judge_audio),
        lambda: adapter.load_in_4bit and check_quantisation(),
        lambda: _check_model(options.model, adapter),
        lambda: adapter.adapter and read_adapter(adapter.adapter),
        lambda: adapter.lora_target_modules and module_regex(adapter.lora_target_modules),
        lambda: installed_trackers(options.tracker),
        lambda: options.train.speech_decoder and decoder_codes(options.train.speech_decoder),
    ]
    errors = []
    for check in checks:
        try:
            check()
        except (UserError, OSError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError([str(text) for error in errors for text in getattr(error, "problems", [error])])


def check_code_options(options: Options, code_ids: range) -> None:
    """Options that are about the audio codes of the family's replies.

    Raises:
        ConfigError: it has none, or more than the decoder speaks.
    """
    check_policy_ids(options.loss, code_ids)
    if (decoder := options.train.speech_decoder) is None:
        return
    if not code_ids:
        raise ConfigError([f"speech_decoder {decoder}: this model's replies hold no audio codes: leave it out"])
    if (size := decoder_codes(decoder)) < len(code_ids):
        raise ConfigError([f"speech_decoder {decoder} speaks {size} audio codes, and the model has {len(code_ids)}: "
                           "name the model's own decoder"])  # fmt: skip


def _check_rewards(reward: RewardConfig) -> None:
    names = [term.name for term in components(reward.rewards)]
    if reward.reward_gate not in ("none", *names):
        raise ConfigError([f"reward_gate {reward.reward_gate!r} is not among the rewards: {', '.join(names)}"])


def _check_model(model: ModelConfig, adapter: AdapterConfig) -> None:
    path = resolve_model(model.model)
    use_family(model.family, path)
    family = family_at(path)
    rates = number_map(adapter.part_learning_rates, what="part_learning_rates")
    check_parts(rates, family, "part_learning_rates")
    check_parts([] if adapter.lora else adapter.train_parts, family, "train_parts")
