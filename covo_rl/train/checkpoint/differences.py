"""What a resume would change: configuration and data against the checkpoint's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from covo_rl.types import Example

#: options that change nothing about the training itself; data files are compared by content, not by path
FREE = frozenset(
    """
    output resume checkpoint_every checkpoint_minutes keep_last keep_best export_checkpoints allow_changed_config
    allow_overlap allow_outside_audio dry_run log_rollouts oom_retry check_rewards reward_timeout evaluate eval_every
    eval_num_generations eval_batch_size data audio_dir eval_data eval_audio_dir eval_limit feature_memory_mb
    """.split()  # noqa: SIM905 - a list of 25 quoted words is harder to read
)
#: options that change only how the same gradient is computed: a resume is right, but not bit for bit
ROUNDING = frozenset(
    {"micro_batch_prompts", "micro_batch_rollouts", "gradient_checkpointing", "shared_decode", "attn_implementation"}
)


def config_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(changes that alter the training, changes that alter only rounding), one readable line each."""
    serious, rounding = [], []
    for name in sorted({*saved, *now} - FREE):
        if saved.get(name) != now.get(name):
            line = f"{name}: {saved.get(name)!r} in the checkpoint, {now.get(name)!r} now"
            (rounding if name in ROUNDING else serious).append(line)
    return serious, rounding


def data_fingerprint(examples: Sequence[Example]) -> dict[str, Any]:
    """Number of rows and a sha256 over ids, questions, choices, answers and clip names, in order."""
    digest = hashlib.sha256()
    for row in examples:
        names = [clip.name.rsplit("/", 1)[-1] for clip in row.clips]
        digest.update(repr((row.id, row.question, row.choices, row.answer, names)).encode())
    return {"rows": len(examples), "sha256": digest.hexdigest()}


def data_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Readable lines; empty when the training rows are the same in the same order."""
    if saved == now:
        return []
    if saved["rows"] != now["rows"]:
        return [f"training data: {saved['rows']} rows in the checkpoint, {now['rows']} now"]
    return ["training data: as many rows as in the checkpoint, but their content or order has changed"]
