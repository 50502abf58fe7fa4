"""Rates by hand: the warm-up starts above zero and then follows transformers."""

import pytest
import torch
from transformers import get_scheduler

from covo_rl.train.schedule import schedule_of


def optimizer(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.AdamW(groups)


def rates(schedule, made, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in made.param_groups])
        assert schedule.get_last_lr() == found[-1]
        made.step()
        schedule.step()
    return found


def test_linear_by_hand():
    made = optimizer(1.0, 0.1)
    found = rates(schedule_of("linear", made, warmup_steps=3, steps=7), made, 7)
    # 1/4 2/4 3/4 of the rate, then 4/4 3/4 2/4 1/4 over the four updates that are left
    assert [first for first, _ in found] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    assert [second for _, second in found] == pytest.approx([0.1 * first for first, _ in found])


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_after_the_warm_up_it_is_transformers(name, warmup):
    made, theirs = optimizer(1.0), optimizer(1.0)
    found = rates(schedule_of(name, made, warmup_steps=warmup, steps=20), made, 20)
    reference = get_scheduler(name, theirs, num_warmup_steps=warmup, num_training_steps=20)
    expected = rates(reference, theirs, 20)
    assert [r for (r,) in found[warmup:]] == pytest.approx([r for (r,) in expected[warmup:]], abs=1e-12)
    assert found[0][0] > 0


def test_a_restored_schedule_goes_on():
    made = optimizer(1.0)
    whole = rates(schedule_of("cosine", made, warmup_steps=2, steps=6), made, 6)
    made = optimizer(1.0)
    schedule = schedule_of("cosine", made, warmup_steps=2, steps=6)
    rates(schedule, made, 3)
    state, groups = schedule.state_dict(), made.state_dict()
    other = optimizer(1.0)
    again = schedule_of("cosine", other, warmup_steps=2, steps=6)
    other.load_state_dict(groups)
    again.load_state_dict(state)
    assert rates(again, other, 3) == whole[3:]
