"""Learning-rate schedules of transformers, except that a warm-up's first update is not thrown away."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from covo_rl.config import ConfigError


def schedule_of(name: str, optimizer: Optimizer, *, warmup_steps: int, steps: int, **specific: float) -> LambdaLR:
    """The schedule `name` over `steps` updates, warm-up n + 1 of w + 1 instead of n of w.

    `specific`: what this schedule alone takes, such as `min_lr_rate` of cosine_with_min_lr: the share of the peak at
    which it ends.

    transformers starts a warm-up at 0: generate, score, and move nothing. After the warm-up the rates are
    transformers' own.

    Raises:
        ConfigError: the schedule hangs on more than the number of updates.
    """
    skip = int(warmup_steps > 0)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps + skip, num_training_steps=steps + skip,
        scheduler_specific_kwargs=specific or None,
    )  # fmt: skip
    if not isinstance(schedule, LambdaLR):
        raise ConfigError([f"lr_scheduler_type {name}: it needs a measure of progress; choose linear, cosine, "
                           "constant, constant_with_warmup, polynomial or inverse_sqrt"])  # fmt: skip
    if not skip:
        return schedule
    factors = schedule.lr_lambdas
    return LambdaLR(optimizer, [lambda updates, factor=factor: factor(updates + 1) for factor in factors])


def advance_schedule(schedule: LambdaLR) -> None:
    """`schedule.step()`, which warns where the first update was left out: not finite, or nothing to learn from."""
    place_schedule(schedule, schedule.last_epoch + 1)


def place_schedule(schedule: LambdaLR, updates: int) -> None:
    """Put it after `updates` updates, with the rates of this run's options."""
    rates = [base * factor(updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    position = {"last_epoch": updates, "_step_count": updates + 1, "_last_lr": rates}
    schedule.load_state_dict({**schedule.state_dict(), **position})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
