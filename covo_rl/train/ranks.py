"""This process among those that a launcher started: the few collectives that training, evaluation and export need.

One process needs no torch for any of them, so importing this is free.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from covo_rl.types import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; every method but `main` is a collective that all ranks call at the same point."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """From the initialised process group, or a single process."""
        dist = sys.modules.get("torch.distributed")  # whoever initialised it has imported it
        if dist is not None and dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def joined(self, values: Sequence[Any]) -> list[Any]:
        """The sequences of all ranks, one after the other in rank order."""
        return [value for part in self.gathered(list(values)) for value in part]

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""
        return self.gathered(value if self.main else None)[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def reduced(self, values: Any, how: str) -> Any:
        """1-D float64 CPU tensor -> elementwise sum or maximum over ranks."""
        import torch

        stacked = torch.tensor(self.gathered(values.tolist()), dtype=values.dtype)
        return stacked.sum(0) if how == "sum" else stacked.amax(0)

    def average_gradients(self, model: Any) -> None:
        """What DDP does inside the last backward of an update."""
        import torch

        for parameter in model.parameters() if self.world > 1 else ():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad.div_(self.world))

    def together(self, action: Callable[[], Any], error: type[UserError]) -> Any:
        """What `action` returns here; when it raises `error` on any rank, every rank does, with what went wrong: a
        subclass, if that is what it was on each of them.

        Without this a full disk on one rank would leave the others waiting for it for ever.

        Raises:
            error: on every rank, naming those where it happened.
        """
        if self.world == 1:
            return action()
        value = failure = kind = None
        try:
            value = action()
        except error as problem:
            failure, kind = str(problem), type(problem)
        failures = [f"rank {rank}: {what}" for rank, what in enumerate(self.gathered(failure)) if what]
        if failures:
            kinds = {kind for kind in self.gathered(kind) if isinstance(kind, type)}
            problem = (kinds.pop() if len(kinds) == 1 else error)("; ".join(failures))
            problem.everywhere = True
            raise problem
        return value
