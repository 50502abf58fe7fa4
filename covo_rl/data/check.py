"""What would spoil a run, found before it starts: with the row's id, all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from covo_rl.data.facts import Facts, clip_facts
from covo_rl.data.problems import Problem, printable
from covo_rl.data.rows import normalized
from covo_rl.types import Example


def row_problems(examples: Sequence[Example], max_clip_seconds: float | None = None) -> list[Problem]:
    """Duplicate ids, answers that are not among the choices, and clips that are missing, broken or too long.

    Every clip is decoded in full: a header says nothing about what follows it.
    """
    ids = Counter(example.id for example in examples)
    problems = [Problem(name, f"{count} rows have this id") for name, count in ids.items() if count > 1]
    heard = facts_by_row(examples)
    for example, clips in zip(examples, heard, strict=True):
        if example.answer is not None and example.choices and not _is_choice(example):
            listed = printable(list(example.choices), 200)
            what = f"its answer {printable(example.answer)} is not among the choices {listed}"
            problems.append(Problem(example.id, what))
        for clip, facts in zip(example.clips, clips, strict=True):
            if facts.error is not None:
                problems.append(Problem(example.id, facts.error))
            elif max_clip_seconds is not None and facts.seconds > max_clip_seconds:
                what = f"{clip.name}: {facts.seconds:.2f} s long, at most {max_clip_seconds:g} s can be taken"
                problems.append(Problem(example.id, what))
    return problems


def duplicates(examples: Sequence[Example]) -> list[Problem]:
    """Rows that ask the same question with the same choices about the same sound as an earlier row."""
    first: dict[tuple[object, ...], Example] = {}
    problems = []
    for example, clips in zip(examples, facts_by_row(examples), strict=True):
        if any(facts.error is not None for facts in clips):
            continue
        earlier = first.setdefault(row_key(example, clips), example)
        if earlier is example:
            continue
        differ = normalized(example.answer or "") != normalized(earlier.answer or "")
        but = f", and answers {printable(example.answer)} where that answers {printable(earlier.answer)}"
        what = f"asks the same about the same sound as row {earlier.id}{but if differ else ''}"
        problems.append(Problem(example.id, what))
    return problems


def facts_by_row(examples: Sequence[Example]) -> list[list[Facts]]:
    """Facts of the clips of every row."""
    flat = iter(clip_facts(clip for example in examples for clip in example.clips))
    return [[next(flat) for _ in example.clips] for example in examples]


def text_key(example: Example) -> tuple[str, tuple[str, ...]]:
    """Question and choices as compared: normalised, in any order of the choices."""
    return normalized(example.question), tuple(sorted(map(normalized, example.choices)))


def row_key(example: Example, clips: Sequence[Facts]) -> tuple[object, ...]:
    """Question, choices and sound as compared."""
    return (*text_key(example), tuple(facts.fingerprint for facts in clips))


def _is_choice(example: Example) -> bool:
    answer = example.answer or ""
    return answer in example.choices or normalized(answer) in map(normalized, example.choices)
