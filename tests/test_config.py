"""Options: YAML and flags, every problem at once, the nearest name for a typo."""

from pathlib import Path

import pytest

from covo_rl.config import ConfigError, Options, number_map, option_names, option_problems, parse_options

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("max_steps: 7\nseed: 3\nrewards: {accuracy: 1.0, format: 0.5}\nlora: false\n")
    options = parse_options(["--config", str(file), "--max-steps", "9"])
    assert (options.train.max_steps, options.train.seed, options.train.prompts_per_step) == (9, 3, 32)
    assert options.reward.rewards == {"accuracy": 1.0, "format": 0.5}
    assert options.adapter.lora is False


def test_full_and_lora_flags():
    assert parse_options(["--full"]).adapter.lora is False
    assert parse_options(["--lora"]).adapter.lora is True
    assert parse_options([]).adapter.lora is True


def test_all_unknown_names_are_reported_at_once_with_the_nearest(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("num_generation: 4\nlearnin_rate: 1\n")
    with pytest.raises(ConfigError) as error:
        parse_options(["--config", str(file), "--max-step", "3"])
    text = str(error.value)
    assert "did you mean num_generations?" in text
    assert "did you mean learning_rate?" in text
    assert "did you mean max_steps?" in text


def test_a_missing_config_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        parse_options(["--config", "nowhere.yaml"])


def test_contradictions_are_reported_together():
    options = Options()
    options.rollout.num_generations = 1
    options.rollout.temperature = 0.0
    problems = option_problems(options)
    assert len(problems) == 2
    assert any("at least 2 rollouts" in p for p in problems)


def test_a_gate_that_would_have_no_effect_is_refused():
    options = Options()
    options.reward.reward_gate, options.loss.component_advantages = "accuracy", True
    assert option_problems(options) == ["reward_gate accuracy has no effect with component_advantages: choose one"]


def test_number_map_reads_names_weights_and_mappings():
    assert number_map("a,b=0.5", what="rewards", default=1.0) == {"a": 1.0, "b": 0.5}
    assert number_map({"a": 2}, what="rewards") == {"a": 2.0}
    with pytest.raises(ConfigError, match="cannot read 'a=x'"):
        number_map("a=x", what="rewards")


def test_option_names_are_unique_over_the_rooms():
    names = option_names()
    assert len(names) == len(set(names))


#: configurations of other recipes begin so
OTHERS = (
    "sft", "pretrain", "speaker", "chat", "pipeline_perception", "pipeline_cot", "tokenizer", "decoder", "tiny_duplex",
)  # fmt: skip
GRPO_CONFIGS = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith(OTHERS))


@pytest.mark.parametrize("path", GRPO_CONFIGS, ids=lambda p: p.name)
def test_every_shipped_grpo_config_parses(path):
    assert parse_options(["--config", str(path)]).train.max_steps > 0
