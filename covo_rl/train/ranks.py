"""The few things that saving together needs from torch.distributed; one process needs none of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; every method that gathers is a collective."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """From the initialised process group, or a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""
        return self.gathered(value if self.main else None)[0]

    def together(self, action: Callable[[], Any], error: type[Exception]) -> None:
        """Run `action` here; when it raises `error` on any rank, every rank does, with what went wrong.

        Without this a full disk on one rank would leave the others waiting for it for ever.

        Raises:
            error: on every rank, naming those where it happened.
        """
        failure = None
        try:
            action()
        except error as problem:
            failure = str(problem)
        failures = [f"rank {rank}: {what}" for rank, what in enumerate(self.gathered(failure)) if what]
        if failures:
            raise error("; ".join(failures))
