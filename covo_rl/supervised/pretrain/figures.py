"""What an update is measured by: sums over the positions of a rank, joined over ranks, as one line of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from covo_rl.speech.grid import CODE_SECONDS
from covo_rl.train.ranks import Ranks

if TYPE_CHECKING:
    from covo_rl.supervised.pretrain.forward import Taught
    from covo_rl.supervised.pretrain.packing import PackedBatch

KINDS = ("text", "codes")
_COUNTS = ("positions", "padding", "audio_seconds", "clips")


class UpdateFigures:
    """Sums of one update: negative log-probs and their number by (task, kind), positions by task, and more.

    `codes` are the ids of codes; `tasks` the names that a batch's numbers stand for.
    """

    def __init__(self, tasks: Sequence[str], codes: range) -> None:
        self.tasks, self.codes = tuple(tasks), codes
        self.losses = torch.zeros(2, len(tasks), len(KINDS), dtype=torch.float64)  # sums and numbers
        self.tokens = torch.zeros(len(tasks), dtype=torch.float64)
        self.counts = torch.zeros(len(_COUNTS), dtype=torch.float64)

    def add(self, batch: PackedBatch, taught: Taught, logps_M: Tensor) -> None:
        """A micro-batch and the log-probs of what it teaches."""
        targets = taught.targets
        kinds = ((targets >= self.codes.start) & (targets < self.codes.stop)).long()
        cells = taught.task * len(KINDS) + kinds
        nll = -logps_M.detach().double().cpu()
        size = len(self.tasks) * len(KINDS)
        sums = torch.stack([torch.zeros(size, dtype=torch.float64).index_add(0, cells, values)
                            for values in (nll, torch.ones_like(nll))])  # fmt: skip
        self.losses += sums.view_as(self.losses)
        drawn = batch.task[batch.task >= 0].long()
        self.tokens += torch.bincount(drawn, minlength=len(self.tasks)).double()
        seconds = CODE_SECONDS * sum(b - a for _, a, b in batch.clips)
        values = (batch.task.numel(), int((batch.task < 0).sum()), seconds, len(batch.clips))
        self.counts += torch.tensor(values, dtype=torch.float64)

    def over(self, ranks: Ranks) -> dict[str, Any]:
        """Over all ranks: `loss`, `loss_KIND`, `loss/TASK`, `loss/TASK/KIND`, `tokens/TASK`, share of padding.

        Losses of which this update teaches nothing are left out.
        """
        joined = torch.cat([self.losses.flatten(), self.tokens, self.counts])
        if ranks.world > 1:
            joined = ranks.reduced(joined, "sum")
        parts = joined.split([self.losses.numel(), len(self.tokens), len(self.counts)])
        (sums_TK, numbers_TK), tokens, counts = parts[0].view_as(self.losses), parts[1], parts[2]
        line: dict[str, Any] = {"loss": _mean(sums_TK, numbers_TK)} if numbers_TK.sum() else {}
        for name, s, n in zip(self.tasks, sums_TK, numbers_TK, strict=True):
            line |= {f"loss/{name}": _mean(s, n)} if n.sum() else {}
            both = bool(n.all())  # of one kind it is the task's own
            line |= {f"loss/{name}/{kind}": _mean(s[i], n[i]) for i, kind in enumerate(KINDS) if both}
        for i, kind in enumerate(KINDS):
            line |= {f"loss_{kind}": _mean(sums_TK[:, i], numbers_TK[:, i])} if numbers_TK[:, i].sum() else {}
        positions, padding, seconds, clips = counts.tolist()
        line |= {"taught": int(numbers_TK.sum()), "tokens": int(positions - padding), "padding": padding / positions,
                 "clips": int(clips), "audio_seconds": round(seconds, 2)}  # fmt: skip
        return line | {f"tokens/{name}": int(count) for name, count in zip(self.tasks, tokens, strict=True)}


def _mean(sums: Tensor, numbers: Tensor) -> float:
    return float(sums.sum() / numbers.sum())
