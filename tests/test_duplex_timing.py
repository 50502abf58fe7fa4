"""Estimators of when to stop, against the objective they stand for: J = sum over stops P(stop) R(stop)."""

import numpy as np
import pytest
import torch

from covo_rl.duplex.rollout import StopRewards, greedy_stop, sample_stops, shuffled_stops, stop_logps
from covo_rl.duplex.timing import (
    TimingOptions,
    exact_loss,
    gold_loss,
    hazard_kl,
    sampled_loss,
    timing_loss,
    trunk_loss,
    waiting_values,
)

Z = (-1.2, 0.3, -2.0, -0.5, 0.1, -1.0, 0.4, -0.8)
#: early stops earn nothing, the first after the end most, never nothing
REWARDS = (0.0, 0.0, 0.0, 3.0, 2.6, 2.2, 1.0, 0.6, 0.0)


def parts():
    return torch.tensor(Z, dtype=torch.float64, requires_grad=True), torch.tensor(REWARDS, dtype=torch.float64)


def gradient_of_j():
    z_K, total_S = parts()
    (stop_logps(z_K).exp() * total_S).sum().backward()
    return z_K.grad


def slope(loss):
    z_K, total_S = parts()
    loss(z_K, total_S).backward()
    return z_K.grad


def test_stop_probabilities_are_products_of_hazards():
    h = 1 / (1 + np.exp(-np.array(Z)))
    probs = stop_logps(parts()[0]).exp().detach().numpy()
    assert probs[0] == pytest.approx(h[0]) and probs[2] == pytest.approx((1 - h[0]) * (1 - h[1]) * h[2])
    assert probs[-1] == pytest.approx(np.prod(1 - h)) and probs.sum() == pytest.approx(1)


def test_log_probs_of_a_sure_model_are_finite():
    logps = stop_logps(torch.tensor([60.0, -60.0, 60.0]))
    assert torch.isfinite(logps).all() and logps.tolist() == pytest.approx([0, -120, -60, -120], abs=1e-3)


def test_stops_are_drawn_as_often_as_they_are_likely():
    z_K, _ = parts()
    drawn = np.bincount(sample_stops(z_K, 40_000, np.random.default_rng(0)), minlength=9) / 40_000
    probs = stop_logps(z_K).exp().detach().numpy()
    assert np.abs(drawn - probs).max() < 4 * np.sqrt(0.25 / 40_000)
    assert greedy_stop(z_K) == 1 and greedy_stop(z_K - 1) == 8  # never


def test_sampled_groups_have_the_gradient_of_j_and_15_of_16_of_its_length():
    draws = sample_stops(parts()[0], 3000 * 16, np.random.default_rng(1)).reshape(3000, 16)
    found, true = -slope(lambda z, r: sampled_loss(z, r, draws, scale=False)), gradient_of_j()
    assert torch.cosine_similarity(found, true, dim=0) > 0.999
    assert found.norm() / true.norm() == pytest.approx(15 / 16, abs=0.01)


def test_exact_and_trunk_are_the_gradient_of_j():
    for loss in (lambda z, r: exact_loss(z, r, scale=False), lambda z, r: trunk_loss(z, r, unsaturated=False)):
        assert torch.allclose(-slope(loss), gradient_of_j(), atol=1e-12)


def test_the_scaled_exact_gradient_is_that_of_j_over_the_deviation():
    z_K, total_S = parts()
    probs = stop_logps(z_K).exp().detach()
    std = ((probs * total_S**2).sum() - (probs * total_S).sum() ** 2).sqrt()
    assert torch.allclose(-slope(exact_loss), gradient_of_j() / (std + 0.02), atol=1e-12)


def test_many_generations_come_to_the_exact_estimator():
    draws = sample_stops(parts()[0], 200_000, np.random.default_rng(2))[None]
    found, exact = slope(lambda z, r: sampled_loss(z, r, draws)), slope(exact_loss)
    assert torch.allclose(found, exact * (1 + 0.02 / 1.2), atol=0.01)  # the deviation of these rewards is about 1.2


def test_waiting_is_worth_what_comes_after():
    h_K, total_S = torch.tensor([0.5, 0.25]), torch.tensor([1.0, 2.0, 4.0])
    # V_2 = 4, V_1 = 0.25 * 2 + 0.75 * 4 = 3.5, V_0 = 0.5 * 1 + 0.5 * 3.5 = 2.25
    assert waiting_values(h_K, total_S).tolist() == [2.25, 3.5, 4.0]


def test_the_trunk_undoes_a_sure_mistake_and_leaves_what_is_right():
    # h = sigmoid(8) = 0.99966: w_0 = 1, w_1 = 0.5; V_1 is 3 h and the best 3, V_2 and its best 0
    z_K = torch.tensor([8.0, 8.0], requires_grad=True)
    trunk_loss(z_K, torch.tensor([0.0, 3.0, 0.0])).backward()
    assert z_K.grad.tolist() == pytest.approx([3, -0.5 * 3.354e-4 * 3], rel=2e-3)  # wait; then stop, as it does
    z_K.grad = None
    trunk_loss(z_K, torch.tensor([0.0, 3.0, 0.0]), unsaturated=False).backward()
    assert z_K.grad.abs().max() < 2e-3


def test_kl_is_that_of_two_way_choices():
    z_K, reference_K = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])
    q = 1 / (1 + np.exp(-1.0))
    expected = 0.5 * np.log(0.5 / q) + 0.5 * np.log(0.5 / (1 - q))
    assert hazard_kl(z_K, reference_K).item() == pytest.approx(expected, rel=1e-5)
    assert hazard_kl(reference_K, reference_K).item() == 0


@pytest.mark.parametrize("estimator", ["sampled", "exact", "trunk", "mix"])
def test_every_estimator_learns_to_wait_for_the_end(estimator):
    # sure of stopping at decision 1, inside the pause; 3 is the first after the end
    z_K = torch.tensor([-4.0, 3.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0], requires_grad=True)
    start, optimiser, rng = z_K.detach().clone(), torch.optim.Adam([z_K], lr=0.1), np.random.default_rng(0)
    for _ in range(100):
        stops = sample_stops(z_K, 16, rng)
        loss, metrics = timing_loss([z_K], [np.array(REWARDS)], [stops], TimingOptions(estimator), [start])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert greedy_stop(z_K) == 3 and metrics["reward"] > 2.5 and metrics["kl"] > 1


def test_shuffled_rewards_have_no_direction():
    rng, total = np.random.default_rng(0), torch.zeros(8, dtype=torch.float64)
    scored = StopRewards(np.array(REWARDS), {}, {})
    for _ in range(800):
        shuffled = torch.tensor(shuffled_stops(scored, rng).total_S)
        total += slope(lambda z, _, shuffled=shuffled: exact_loss(z, shuffled, scale=False))
    assert (total / 800).norm() < 0.2 * gradient_of_j().norm()


def test_gold_updates_raise_the_prescribed_stop():
    z_K, _ = parts()
    loss = gold_loss([z_K, z_K], [3, 8])
    expected = -(stop_logps(z_K)[3] + stop_logps(z_K)[8]) / 2
    assert loss.item() == pytest.approx(expected.item())


def test_the_loss_of_a_batch_is_the_mean_over_streams_and_tells_groups_without_variance():
    z_K, _ = parts()
    options, stops = TimingOptions("exact", beta=0.0), [np.zeros(2, int)] * 2
    loss, metrics = timing_loss([z_K, z_K[:2]], [np.array(REWARDS), np.ones(3)], stops, options)
    assert loss.item() == pytest.approx(exact_loss(z_K, torch.tensor(REWARDS)).item() / 2)
    assert metrics["groups_without_variance"] == 0.5 and "kl" not in metrics


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"totals": [np.ones(3)]}, "stream 0 has 8 decisions and rewards"), ({"references": None}, "0 references"),
     ({"totals": [np.full(9, np.nan)]}, "finite: False")],
)  # fmt: skip
def test_what_does_not_fit_is_said(change, problem):
    z_K, _ = parts()
    arguments = {"z": [z_K], "totals": [np.array(REWARDS)], "references": [z_K]} | change
    with pytest.raises(ValueError, match=problem):
        timing_loss(options=TimingOptions(), stops=[np.zeros(2, int)], **arguments)


def test_options_say_all_that_is_wrong():
    with pytest.raises(ValueError, match=r"choose sampled, exact, trunk, mix; generations 1.*; beta -1"):
        TimingOptions("greedy", generations=1, beta=-1)
