"""What would spoil a run, found before it starts: with the row's id, all at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from covo_rl.audio import AudioError, decode, fingerprint_of
from covo_rl.data.read import Problem, printable
from covo_rl.data.rows import normalized
from covo_rl.types import Clip, Example

#: Decoding, hashing and numpy release the interpreter lock; more threads than this only hold more clips in memory.
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Facts:
    """Of a decoded clip: `seconds` and `fingerprint`, or in `error` why it cannot be used."""

    seconds: float = 0.0
    fingerprint: str = ""
    error: str | None = None


def row_problems(examples: Sequence[Example], max_clip_seconds: float | None = None) -> list[Problem]:
    """Duplicate ids, answers that are not among the choices, and clips that are missing, broken or too long.

    Every clip is decoded in full: a header says nothing about what follows it.
    """
    ids = Counter(example.id for example in examples)
    problems = [Problem(name, f"{count} rows have this id") for name, count in ids.items() if count > 1]
    for example, clips in zip(examples, facts_by_row(examples), strict=True):
        answer, choices = example.answer, example.choices
        is_choice = answer is None or answer in choices or normalized(answer) in map(normalized, choices)
        if choices and not is_choice:
            what = f"its answer {printable(answer)} is not among the choices {printable(list(choices), 200)}"
            problems.append(Problem(example.id, what))
        for clip, facts in zip(example.clips, clips, strict=True):
            if facts.error is not None:
                problems.append(Problem(example.id, facts.error))
            elif max_clip_seconds is not None and facts.seconds > max_clip_seconds:
                what = f"{clip.name}: {facts.seconds:.2f} s long, at most {max_clip_seconds:g} s can be taken"
                problems.append(Problem(example.id, what))
    return problems


def duplicate_rows(examples: Sequence[Example]) -> list[Problem]:
    """Rows that ask the same question with the same choices about the same sound as an earlier row."""
    first: dict[tuple[object, ...], Example] = {}
    problems = []
    for example, clips in zip(examples, facts_by_row(examples), strict=True):
        if any(facts.error is not None for facts in clips):
            continue
        earlier = first.setdefault((*text_key(example), *(facts.fingerprint for facts in clips)), example)
        if earlier is example:
            continue
        what = f"asks the same about the same sound as row {earlier.id}"
        if normalized(example.answer or "") != normalized(earlier.answer or ""):
            what += f", and answers {printable(example.answer)} where that answers {printable(earlier.answer)}"
        problems.append(Problem(example.id, what))
    return problems


def text_key(example: Example) -> tuple[str, tuple[str, ...]]:
    """Question and choices as compared: normalised, in any order of the choices."""
    return normalized(example.question), tuple(sorted(map(normalized, example.choices)))


def facts_by_row(examples: Sequence[Example]) -> list[list[Facts]]:
    """Facts of the clips of every row, each file decoded once per process as long as it does not change."""
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = pool.map(_facts, [clip for example in examples for clip in example.clips])
        return [[next(facts) for _ in example.clips] for example in examples]


def _facts(clip: Clip) -> Facts:
    try:
        state = os.stat(clip.path or "")
    except (OSError, ValueError):
        return _measured(clip)
    return _measured_file(str(clip.path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1_000_000)
def _measured_file(path: str, size: int, mtime_ns: int) -> Facts:
    return _measured(Clip(path=path))


def _measured(clip: Clip) -> Facts:
    try:
        waveform, rate = decode(clip)
    except AudioError as error:
        return Facts(error=str(error))
    return Facts(len(waveform) / rate, fingerprint_of(waveform, rate))
