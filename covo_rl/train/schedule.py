"""Learning-rate schedules of transformers, except that a warm-up's first update is not thrown away."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer
from transformers import get_scheduler


def schedule_of(name: str, optimizer: Optimizer, *, warmup_steps: int, steps: int) -> Any:
    """The schedule `name` over `steps` updates, warm-up n + 1 of w + 1 instead of n of w.

    transformers starts a warm-up at 0: generate, score, and move nothing. After the warm-up the rates are
    transformers' own.
    """
    if not warmup_steps:
        return get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=steps)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps + 1, num_training_steps=steps + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an update before this: here its rate, 0, is left out
        schedule.step()
    return schedule
