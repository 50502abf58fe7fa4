"""How much goes through the model at once, and the same work in smaller parts where memory ran out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from covo_rl.train.checkpoint.state import load_random_state, random_state
from covo_rl.train.guard import TrainingStopped, is_out_of_memory, memory_explained
from covo_rl.train.ranks import Ranks


@dataclass
class MicroBatch:
    """Whole groups (`prompts` of them), or `rollouts` of a single one."""

    prompts: int
    rollouts: int

    def halve(self) -> bool:
        """False where it is one rollout already."""
        if self.prompts > 1:
            self.prompts //= 2
        elif self.rollouts > 1:
            self.rollouts //= 2
        else:
            return False
        return True


def within_memory(
    work: Callable[[], Any], size: MicroBatch, *, retry: bool, ranks: Ranks, advice: Callable[[], str],
    undo: Callable[[], None],
) -> Any:  # fmt: skip
    """`work()`; with `retry`, where memory ran out on any rank, all undo theirs and repeat it with half of `size`.

    The random state is that of the first try. A rank that fails in the middle would leave the others waiting in a
    collective, so with several ranks `work` makes none but at its start.

    Raises:
        TrainingStopped: memory ran out without `retry`, or with the smallest size.
    """
    if not retry:
        with memory_explained(advice()):
            return work()
    before = random_state()
    while True:
        result, failure = None, None
        try:
            result = work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # whose frames hold the tensors
        if not any(ranks.gathered(failure is not None)):
            return result
        if not size.halve():
            raise TrainingStopped(advice()) from failure
        undo()
        load_random_state(*before)
        torch.cuda.empty_cache()
