"""Advantages: numbers by hand, what is missing, and equality with the formulas of the papers."""

import math

import numpy as np
import pytest

from covo_rl.algo.advantage import advantages, concatenated, overlong_penalty
from covo_rl.config import LossConfig
from covo_rl.types import RewardTable

NAN = math.nan


def table(rewards_PG, components_PGR=None, weights_R=None):
    """A reward table of one component, or of the given ones with their weighted sum."""
    rewards_PG = np.array(rewards_PG, dtype=float)
    rewards_PGR = rewards_PG[..., None] if components_PGR is None else np.array(components_PGR, dtype=float)
    weights_R = np.ones(rewards_PGR.shape[-1]) if weights_R is None else np.array(weights_R, dtype=float)
    return RewardTable(tuple("abc"[: len(weights_R)]), weights_R, rewards_PGR, rewards_PG)


def test_group_scaling_by_hand():
    # mean 0.5; sample variance (4 * 0.25) / 3 = 1/3, deviation 0.57735; 0.5 / (0.57735 + 1e-4) = 0.86588
    result = advantages(table([[0, 0, 1, 1]]), LossConfig())
    np.testing.assert_allclose(result.advantages_PG, [[-0.865875, -0.865875, 0.865875, 0.865875]], atol=1e-6)
    assert result.informative_P.tolist() == [True]


def test_no_scaling_is_the_difference_from_the_group_mean():
    result = advantages(table([[0, 0, 1, 1], [4, 2, 3, 3]]), LossConfig(scale_rewards="none"))
    assert result.advantages_PG.tolist() == [[-0.5, -0.5, 0.5, 0.5], [1, -1, 0, 0]]


def test_batch_scaling_divides_by_the_deviation_of_all_rewards():
    # all rewards 0, 2, 2, 4: mean 2, sample variance 8 / 3
    result = advantages(table([[0, 2], [2, 4]]), LossConfig(scale_rewards="batch"))
    np.testing.assert_allclose(result.advantages_PG, np.array([[-1, 1], [-1, 1]]) / (math.sqrt(8 / 3) + 1e-4))


def test_a_missing_reward_leaves_the_group_statistics_and_gets_zero():
    # without the NaN: [0, 1], mean 0.5, deviation 0.70711; 0.5 / (0.70711 + 1e-4) = 0.70701
    result = advantages(table([[0, NAN, 1]]), LossConfig())
    np.testing.assert_allclose(result.advantages_PG, [[-0.707007, 0.0, 0.707007]], atol=1e-6)
    assert result.statistics["rewards_missing"] == 1
    assert result.statistics["reward"] == 0.5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group", [[NAN, NAN, NAN], [NAN, 0.7, NAN], [0.1, 0.1, 0.1]])
def test_groups_that_teach_nothing_are_zero_and_counted(scale, group):
    result = advantages(table([group, [0, 1, 1]]), LossConfig(scale_rewards=scale))
    assert result.advantages_PG[0].tolist() == [0, 0, 0]
    assert result.informative_P.tolist() == [False, True]
    assert result.statistics["groups_without_variance"] == 1
    assert result.statistics["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_never_passes(scale, value):
    with_inf = advantages(table([[0, 1, value]]), LossConfig(scale_rewards=scale))
    with_nan = advantages(table([[0, 1, NAN]]), LossConfig(scale_rewards=scale))
    assert with_inf.advantages_PG.tolist() == with_nan.advantages_PG.tolist()
    assert np.isfinite(with_inf.advantages_PG).all() and with_inf.advantages_PG[0, 1] > 0
    assert with_inf.statistics["rewards_infinite"] == 1


def test_components_are_normalised_before_they_are_summed():
    # Component a spreads over 1, component b over 0.01: in the sum b is nothing, by component it counts as much.
    parts = [[[0, 0.01], [1, 0.00]]]
    whole = table(np.sum(parts, axis=-1), parts)
    assert advantages(whole, LossConfig()).advantages_PG[0, 1] > 0.7
    by_component = advantages(whole, LossConfig(component_advantages=True)).advantages_PG
    # a: -+0.5 / (0.70711 + 1e-4) = -+0.70701; b: +-0.005 / (0.0070711 + 1e-4) = +-0.69725; sum -+0.00976, whose
    # deviation over the batch is 0.013798: -0.00976 / (0.013798 + 1e-4) = -0.70202
    np.testing.assert_allclose(by_component, [[-0.7020, 0.7020]], atol=2e-4)


def test_a_missing_component_contributes_nothing_to_its_rollout():
    parts = [[[0, 0], [1, NAN], [1, 1]]]
    result = advantages(table([[0, 1, 2]], parts), LossConfig(component_advantages=True))
    first, second, third = result.advantages_PG[0]
    assert first < 0 < second < third


def test_gating_that_removed_a_whole_reward_also_holds_by_component():
    parts = [[[0, 0], [1, 1], [1, 0.5]]]
    result = advantages(table([[0, NAN, 1.5]], parts), LossConfig(component_advantages=True))
    assert result.advantages_PG[0, 1] == 0.0


def test_overlong_penalty_is_the_ramp_of_dapo():
    # limit 100, buffer 20: free to 80, then down to -1 at 100
    assert overlong_penalty(np.array([0, 80, 85, 90, 100, 101]), 100, 20).tolist() == [0, 0, -0.25, -0.5, -1, -1]
    assert overlong_penalty(np.array([99, 100, 101]), 100, 0).tolist() == [0, 0, -1]


@pytest.mark.parametrize("by_component", [False, True])
def test_overlong_penalty_separates_equal_rewards(by_component):
    config = LossConfig(overlong_buffer=20, component_advantages=by_component)
    result = advantages(table([[1, 1]]), config, lengths_PG=np.array([[80, 90]]), max_completion_length=100)
    assert result.rewards_PG.tolist() == [[1, 0.5]]
    assert result.advantages_PG[0, 0] > 0 > result.advantages_PG[0, 1]
    assert result.statistics["overlong_penalty"] == -0.25


def test_overlong_penalty_without_lengths_is_an_error():
    with pytest.raises(ValueError, match="lengths_PG and max_completion_length"):
        advantages(table([[1, 0]]), LossConfig(overlong_buffer=8))


def test_two_ranks_together_equal_one():
    config = LossConfig(scale_rewards="batch")
    tables = [table([[0, 1]]), table([[3, 1], [2, 2]])]
    whole = advantages(table([[0, 1], [3, 1], [2, 2]]), config)
    second = advantages(concatenated(tables), config).part(slice(1, 3))
    assert second.advantages_PG.tolist() == whole.advantages_PG[1:].tolist()
    assert second.informative_P.tolist() == [True, False]


def test_unknown_scaling_and_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="choose group, batch or none"):
        advantages(table([[0, 1]]), LossConfig(scale_rewards="prompt"))
    with pytest.raises(ValueError, match=r"rewards_PGR \(1, 2, 3\)"):
        advantages(table([[0, 1]], np.zeros((1, 2, 3)), np.ones(2)), LossConfig())
