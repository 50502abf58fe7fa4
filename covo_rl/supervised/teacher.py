"""What the policy is taught to write: right, wrong or broken on purpose, drawn from a seed per row."""

from __future__ import annotations

import random
from collections.abc import Sequence

from covo_rl.prompt import reference_completion
from covo_rl.supervised.config import Stage
from covo_rl.types import Example


class TeacherError(ValueError):
    """A row lacks what its teacher needs; the message names rows and columns."""


#: how a completion is damaged: tags that are missing
BROKEN = (
    "{think}<answer>{answer}</answer>",
    "<think>{think}<answer>{answer}</answer>",
    "<think>{think}</think>{answer}",
    "<think>{think}</think><answer>{answer}",
)


def completions(rows: Sequence[Example], stage: Stage, seed: int, column: str = "completion") -> list[str]:
    """One target text per row, from one random stream.

    Raises:
        TeacherError: names the first ten rows that lack something and how many there are.
    """
    rng, texts, problems = random.Random(seed), [], []
    for row in rows:
        try:
            texts.append(completion(row, stage, rng, column))
        except TeacherError as error:
            problems.append(str(error))
    if problems:
        more = [f"and {len(problems) - 10} more rows"] if len(problems) > 10 else []
        raise TeacherError("\n".join([*problems[:10], *more]))
    return texts


def completion(example: Example, stage: Stage, rng: random.Random, column: str = "completion") -> str:
    """The text after the prompt, without the end token.

    Raises:
        TeacherError: the row lacks what the teacher needs; names the row and the column.
    """
    if stage.teacher == "column":
        text = example.columns.get(column)
        if not isinstance(text, str) or not text.strip():
            raise TeacherError(f"{example.id}: no text in column {column!r}; it has {', '.join(example.columns)}")
        return text

    def other(value: str) -> str:
        return rng.choice([choice for choice in example.choices if choice != value])

    evidence = example.columns.get("evidence")
    if not isinstance(evidence, str) or example.answer is None:
        raise TeacherError(f"{example.id}: the evidence teacher needs an answer and a column 'evidence'")
    conclusion = example.answer if rng.random() < stage.right else other(example.answer)
    answer = other(conclusion) if rng.random() < stage.inconsistent else conclusion
    think = f"{evidence} So the answer is {conclusion}."
    if rng.random() < stage.broken:
        return rng.choice(BROKEN).format(think=think, answer=answer)
    return reference_completion(think, answer)
