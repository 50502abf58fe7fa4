"""Wrong inputs: everything that is wrong with the data and the predictions, in one report that names rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from covo_rl.types import Example

#: So many row names are listed for one problem.
SHOWN = 20
#: Share of rows whose answer may be missing from the options before the file is refused as broken.
MAX_BAD_KEYS = 0.05


class EvalInputError(ValueError):
    """All problems of an evaluation's inputs at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("the evaluation cannot start:\n" + "\n".join(f"  - {p}" for p in self.problems))


def named(ids: Sequence[str]) -> str:
    """`3 rows: a, b, c`, cut after SHOWN names."""
    more = f", ... ({len(ids) - SHOWN} more)" if len(ids) > SHOWN else ""
    return f"{len(ids)} row{'s' * (len(ids) != 1)}: {', '.join(ids[:SHOWN])}{more}"


def duplicates(ids: Sequence[str]) -> list[str]:
    """Ids that occur more than once, in order of their second appearance, each once."""
    seen: set[str] = set()
    return list(dict.fromkeys(i for i in ids if i in seen or seen.add(i)))


def key_problems(examples: Sequence[Example], *, has_answers: bool) -> tuple[list[str], list[str]]:
    """(what makes an evaluation meaningless, what is only worth knowing) about an answer key."""
    errors, warnings = [], []
    if not examples:
        errors.append("the data file has no rows")
    if twice := duplicates([e.id for e in examples]):
        errors.append(f"duplicate ids in {named(twice)}")
    if not has_answers:
        return errors, warnings
    if without := [e.id for e in examples if e.answer is None]:
        errors.append(f"no answer in {named(without)}; sets without a key are scored by their hosts (mmau-test)")
    bad = [e.id for e in examples if e.answer is not None and e.choices and e.answer not in e.choices]
    if bad:
        text = f"the answer is not among the choices in {named(bad)}"
        if (len(bad) > MAX_BAD_KEYS * len(examples) and len(bad) > 1) or len(bad) == len(examples):
            errors.append(f"{text}; over {MAX_BAD_KEYS:.0%} of the rows: is this an edition with a broken key?")
        else:
            warnings.append(f"{text}; the official rule is applied as it stands")
    if equal := [e.id for e in examples if len(set(e.choices)) < len(e.choices)]:
        warnings.append(f"duplicate options in {named(equal)}; every copy of the answer is accepted")
    return errors, warnings


def clip_problems(examples: Sequence[Example]) -> list[str]:
    """One line for all rows whose audio files do not exist, one for those whose files are no audio (headers only)."""
    import soundfile

    missing, broken = {}, {}
    for example in examples:
        for clip in example.clips:
            if clip.path is None:
                continue
            if not Path(clip.path).is_file():
                missing[example.id] = clip.path
                continue
            try:
                soundfile.info(clip.path)
            except RuntimeError as error:  # soundfile.LibsndfileError
                broken[example.id] = f"{clip.path}: {error}"
    lines = []
    for rows, what in ((missing, "audio files are missing"), (broken, "audio files cannot be read")):
        if rows:
            first = next(iter(rows.values()))
            lines.append(f"{what} in {named(list(rows))} (first: {first}); check --audio-dir")
    return lines


def prediction_problems(examples: Sequence[Example], predictions: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """(predictions for unknown rows, rows without a prediction): the first are errors, the second are counted wrong."""
    known = {e.id for e in examples}
    unknown = [i for i in predictions if i not in known]
    missing = [e.id for e in examples if e.id not in predictions]
    errors = [f"predictions for unknown ids in {named(unknown)}; not in the data"] if unknown else []
    return errors, [f"no prediction for {named(missing)}; counted as wrong"] if missing else []
