"""For ms-swift: our rewards under names of yours. A plug-in file of your own,

    from covo_rl.interop.swift import register

    register("covo_accuracy", "accuracy")
    register("covo_total", "accuracy=1,format=0.5", reward_gate="accuracy")

goes to `swift rlhf --rlhf_type grpo --external_plugins FILE --reward_funcs covo_total`, with rows of
`covo-rl data convert IN train.jsonl --to swift` (docs/interop.md). Do not give this file itself: ms-swift puts the
folder of a plug-in in front of its imports, and there it would take swift.py for itself.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift.rewards import ORM, orms

from covo_rl.interop.scoring import lone_scores, lone_terms
from covo_rl.rewards import RewardError


def register(name: str, rewards: str, **options: Any) -> None:
    """The weighted sum of `rewards` as `--reward_funcs name`; `options` are those of `interop.scoring.lone_scores`.

    Raises:
        RewardError: the name is taken, or a reward cannot be loaded or used in another trainer.
    """
    if name in orms:
        raise RewardError(f"ms-swift has a reward {name!r} already: give ours another name, for example covo_{name}")
    lone_terms(rewards)

    class CovoReward(ORM):
        def __call__(
            self, completions: Sequence[str], covo_row: Sequence[Any] | None = None,
            finish_reason: Sequence[str | None] | None = None, **columns: Any,
        ) -> list[float]:  # fmt: skip
            nothing = [None] * len(completions)
            rows, reasons = covo_row or nothing, [reason or "stop" for reason in finish_reason or nothing]
            scores = lone_scores(rows, completions, rewards=rewards, stop_reasons=reasons, **options)
            return [each["score"] for each in scores]

    CovoReward.__name__ = name  # under which it is logged
    orms[name] = CovoReward
