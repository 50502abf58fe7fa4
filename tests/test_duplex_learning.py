"""The shipped configuration in short: supervised it answers early in long pauses, RL of timing repairs some of it."""

import pytest
import yaml

from covo_rl.data.files import read_record
from covo_rl.duplex.config import duplex_options
from covo_rl.resolve import find
from covo_rl.run.timing import run_timing


def result_of(folder, **more):
    """result.json of the shipped configuration, with a quarter of its updates."""
    config = find("recipes", "configs/tiny_duplex.yaml")
    layers = {str(config): yaml.safe_load(config.read_text()), "test": {"max_steps": 400, "seed": 21, **more}}
    return read_record(run_timing(duplex_options({**layers, "folder": {"output": str(folder)}})))


@pytest.mark.slow
def test_supervision_answers_early_in_long_pauses_and_rewards_repair_some_of_it(tmp_path):
    result = result_of(tmp_path / "rl")
    before, after = result["before"], result["after"]
    assert before["early_long_pause"] >= 0.9 and before["single_turn_success"] >= 0.95
    assert after["early_long_pause"] <= before["early_long_pause"] - 0.25 and after["single_turn_success"] >= 0.7
    assert after["single_turn_success"] >= result["threshold_single_at_equal_early"] + 0.1
    assert after["back_channel_ignored"] >= before["back_channel_ignored"]
    assert after["barge_in_success"] >= 0.85 and after["floor_held"] >= 0.85


@pytest.mark.slow
def test_rewards_that_are_dealt_at_random_teach_no_patience_that_pays(tmp_path):
    after = result_of(tmp_path / "shuffled", control="shuffled")["after"]
    assert after["long_pause_success"] <= 0.3
