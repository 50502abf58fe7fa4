"""Learning-rate schedules of transformers, except that a warm-up's first update is not thrown away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


def schedule_of(name: str, optimizer: Optimizer, *, warmup_steps: int, steps: int) -> Any:
    """The schedule `name` over `steps` updates, warm-up n + 1 of w + 1 instead of n of w.

    transformers starts a warm-up at 0: generate, score, and move nothing. After the warm-up the rates are
    transformers' own.
    """
    if not warmup_steps:
        return get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=steps)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps + 1, num_training_steps=steps + 1)
    if isinstance(schedule, LambdaLR):
        schedule.lr_lambdas = [_one_later(factor) for factor in schedule.lr_lambdas]
        schedule._last_lr = []
        for group, rate, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(0)
            schedule._last_lr.append(group["lr"])
    return schedule


def _one_later(factor: Callable[[int], float]) -> Callable[[int], float]:
    return lambda update: factor(update + 1)
