"""Which rows come next: every row once per epoch, in an order that only the seed decides."""

from __future__ import annotations

import random
from collections.abc import Sequence

from covo_rl.types import Example


class PromptSampler:
    """Endless rows in seeded epoch order. The state is two integers, so a resume continues exactly.

    The order does not depend on the number of ranks: every rank draws the same rows and keeps its share.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        if not examples:
            raise ValueError("no training rows: the data set is empty")
        self.examples = list(examples)
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._order = self._shuffled(0)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.examples)))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return order

    def take(self, count: int) -> list[Example]:
        """The next `count` rows; a new epoch begins where one ends."""
        rows = []
        for _ in range(count):
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled(self.epoch)
            rows.append(self.examples[self._order[self.position]])
            self.position += 1
        return rows

    def peek(self, count: int) -> list[Example]:
        """What `take` would return; it is still to be taken."""
        state = self.epoch, self.position, self._order
        try:
            return self.take(count)
        finally:
            self.epoch, self.position, self._order = state

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "rows": len(self.examples), "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`. Raises ValueError when it comes from another data set size or seed."""
        if (state["rows"], state["seed"]) != (len(self.examples), self.seed):
            raise ValueError(
                f"the sampler state is of {state['rows']} rows and seed {state['seed']}, "
                f"this run has {len(self.examples)} rows and seed {self.seed}"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled(self.epoch)


def share(items: Sequence, rank: int, world: int) -> list:
    """This rank's items, in contiguous runs whose lengths differ by at most one."""
    base, extra = divmod(len(items), world)
    start = rank * base + min(rank, extra)
    return list(items[start : start + base + (rank < extra)])
