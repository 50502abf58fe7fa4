"""What is wrong with the rows of the stages, all of it with row ids, before a model is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, number_map
from covo_rl.data import DataError, row_problems
from covo_rl.data.check import sound_of
from covo_rl.data.read import Problem
from covo_rl.policy.patterns import PatternError, check_parts
from covo_rl.prompt import parse
from covo_rl.supervised.config import PARTS, ColdStartConfig, Stage
from covo_rl.types import Example, visible

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


def check_rows(examples: Sequence[Example], source: str) -> None:
    """Duplicate ids, answers and clips: missing, broken. Raises DataError with every row."""
    if not examples:
        raise ConfigError([f"{source}: no rows"])
    if problems := row_problems(examples):
        raise DataError(source, problems)


def check_apart(train: Sequence[Example], held_out: Sequence[Example], source: str, clips: ClipStore) -> None:
    """Raises DataError with every held-out row whose sound a stage would be taught."""
    taught = {sound: row.id for row in train if (sound := sound_of(row, clips))}
    problems = [
        Problem(row.id, f"its sound is also taught, as {visible(taught[sound])}: held-out figures would say nothing")
        for row in held_out if (sound := sound_of(row, clips)) in taught
    ]  # fmt: skip
    if problems:
        raise DataError(source, problems)


def check_stage_rows(config: ColdStartConfig, count: int) -> None:
    """Raises ConfigError for stages that ask for rows which `count` rows of data do not have."""
    problems = []
    for i, stage in list(enumerate(config.stages))[config.start_stage :]:
        end = stage.first_row + (stage.rows or 1)
        if end > count:
            asked = f"rows {stage.first_row} to {end - 1}" if stage.rows else f"first_row {stage.first_row}"
            problems.append(f"stages[{i}]: {asked}: the data has {count} rows for training; leave rows out for all")
    if problems:
        raise ConfigError(problems)


def fact_problems(rows: Sequence[Example]) -> list[Problem]:
    """Rows that tagging cannot use: facts that are missing, empty, or outside their lexicon; not exactly one clip."""
    problems = []
    for row in rows:
        facts, lexicon = row.columns.get("facts"), row.columns.get("fact_lexicon")
        if len(row.clips) != 1:
            problems.append(Problem(row.id, f"tagging needs one clip, the row has {len(row.clips)}"))
        for name, value in (("facts", facts), ("fact_lexicon", lexicon)):
            if not isinstance(value, Mapping) or not value:
                what = "no" if value is None else f"no mapping in {value!r} for"
                problems.append(Problem(row.id, f"{what} column {name!r}, which tagging needs, by name of the fact"))
        if isinstance(facts, Mapping) and isinstance(lexicon, Mapping):
            problems += [Problem(row.id, text) for text in _outside(facts, lexicon)]
    return problems


def _outside(facts: Mapping[str, Any], lexicon: Mapping[str, Any]) -> list[str]:
    texts = []
    for name, value in facts.items():
        values = lexicon.get(name)
        if not isinstance(values, (list, tuple)):
            texts.append(
                f"fact {name!r} has no list of values in fact_lexicon; there are {', '.join(lexicon) or 'none'}"
            )
        elif value is None:
            texts.append(f"fact {name!r} has no value: leave it out where it is not known")
        elif value not in values:
            texts.append(f"fact {name!r} is {value!r}, which is not in its lexicon {list(values)!r}")
    return texts


def trained_parts(family: AudioFamily, stage: Stage) -> set[str]:
    """Parts of the family that the stage trains; its default, all of PARTS, means those that there are.

    Raises:
        PatternError: the stage names a part that this family does not have, or a rate for one that does not train.
    """
    if stage.kind == "tagging":
        return {"encoder", "audio_adapter"} & set(family.parts)
    parts = set(stage.train_parts or PARTS)
    if parts != set(PARTS):
        check_parts(stage.train_parts, family, "train_parts")
    parts &= set(family.parts)
    rates = number_map(stage.part_learning_rates, what="part_learning_rates")
    check_parts(rates, family, "part_learning_rates")
    if idle := sorted(rates.keys() - parts):
        raise PatternError(f"part_learning_rates names {', '.join(idle)}: train_parts has {', '.join(sorted(parts))}")
    return parts


def unreadable(rows: Sequence[Example], texts: Sequence[str], stage: Stage) -> list[str]:
    """Rows whose own completion the grammar cannot read, with what is wrong; other teachers break it on purpose."""
    if stage.teacher != "column":
        return []
    return [f"{visible(row.id)}: {parsed.problems[0]}" for row, text in zip(rows, texts, strict=True)
            if (parsed := parse(text)).problems]  # fmt: skip
