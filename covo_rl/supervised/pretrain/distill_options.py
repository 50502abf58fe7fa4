"""Options of distillation, as the YAML of a training has them under `distill:`; checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from covo_rl.config import option, typed_values, value_problems

#: interval -> options that must lie in it
LIMITS = {
    "[1, inf)": "top_k prompts_per_update every max_new_tokens batch_size",
    "[0, inf)": "weight",
    "(0, inf)": "temperature",
}


@dataclass
class DistillOptions:
    """Distillation of the student towards a teacher, in updates of pre-training."""

    teacher: str = option("", "folder or hub name of the teacher: a causal language model of transformers, or a family")
    data: str = option("", "rows with a prompt (or turns that end with the user's): JSONL or parquet, folder, pattern")
    top_k: int = option(20, "ids of the teacher that are kept per position")
    outside: str = option(
        "rest", "the teacher's mass outside them: one more outcome, or the top k are scaled up to 1",
        ["rest", "renormalise"],
    )  # fmt: skip
    weight: float = option(1.0, "of its loss, the mean KL of a reply's ids, beside that of the packed rows; 0 is off")
    prompts_per_update: int = option(8, "prompts of an update, over all ranks")
    every: int = option(1, "updates from one distillation to the next")
    max_new_tokens: int = option(256, "limit of a reply")
    temperature: float = option(1.0, "at which the student samples its replies; the KL is at 1")
    batch_size: int = option(4, "replies in one pass with gradient")
    teacher_dtype: str = option(
        "auto", "precision of the teacher; auto is its checkpoint's", ["auto", "float32", "bfloat16", "float16"]
    )  # fmt: skip


def distill_problems(options: DistillOptions) -> list[str]:
    """What is missing or impossible in the options; empty when all is well."""
    missing = [f"{name}: give one" for name in ("teacher", "data") if not getattr(options, name)]
    return [f"distill: {problem}" for problem in (*missing, *value_problems(options, LIMITS))]


def distill_options(values: Any, problems: list[str]) -> DistillOptions:
    """The options of a mapping; what is wrong with them, unknown names with the nearest one, is added to `problems`."""
    if not isinstance(values, Mapping):
        problems.append(f"distill: expected a mapping of options, found {type(values).__name__}")
        return DistillOptions()
    options = DistillOptions(**typed_values(get_type_hints(DistillOptions), values, problems, "distill"))
    problems += distill_problems(options)
    return options
