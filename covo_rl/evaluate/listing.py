"""`covo-rl eval --list`: which sets there are, what each asks for, and which of its scores have been published."""

from __future__ import annotations

from collections.abc import Iterable

from covo_rl.evaluate.sets import FILES, EvalSet, load_set
from covo_rl.evaluate.speech.sets import KINDS, SpeechSet, TaskKind
from covo_rl.evaluate.tables import source_lines, table_lines


def sets_markdown(name: str | None) -> str:
    """A table of all sets, or what one set says of itself and of its sub-sets.

    Raises:
        EvalInputError: there is no set of that name.
    """
    if name is not None:
        return "\n".join(_one(load_set(name)))
    head = ("set", "rows", "licence", "scored by", "engines", "published scores")
    notes = (
        "Engines in brackets add figures. --transcriber is not needed where predictions have asr_text or words.",
        "Sub-sets, sources and how to get the data: covo-rl eval --list --set NAME",
    )
    return "\n".join([*table_lines(head, [_row(name, load_set(name)) for name in FILES]), *notes])


def _row(name: str, found: EvalSet | SpeechSet) -> tuple[str, ...]:
    if isinstance(found, EvalSet):
        rule = "when it speaks" if found.streams else found.scorer_rule if found.has_answers else "its host"
        return (name, _count(found.rows), found.licence, rule, "none", str(sum(map(len, found.published.values()))))
    needs = _ordered(flag for kind in found.kinds for flag in KINDS[kind].needs)
    also = _ordered(flag for kind in found.kinds for flag in KINDS[kind].also if flag not in needs)
    engines = ", ".join([*needs, *(f"[{flag}]" for flag in also)]) or _without_engines(found)
    return (
        name, _count(found.row_count), found.licence, ", ".join(found.kinds), engines, str(found.published_count)
    )  # fmt: skip


def _one(found: EvalSet | SpeechSet) -> list[str]:
    facts = [f"# {found.title}", "", f"- source: {found.source}", f"- licence: {found.licence}",
             f"- data: {found.how_to_get}"]  # fmt: skip
    scores = {f"{figure}: {model}": value for figure, by in found.published.items() for model, value in by.items()}
    published = [
        *([f"- published: {'; '.join(f'{name} {value}' for name, value in scores.items())}"] if scores else []),
        *(f"- {line}" for line in source_lines(found.published_in)),
    ]
    if isinstance(found, EvalSet):
        return [*facts, f"- rows: {_count(found.rows)}", f"- rule: {found.scorer_rule}",
                f"- wordings: covo{''.join(f', {name}' for name in found.prompts)}", *published, ""]  # fmt: skip
    rows = [
        (subset.name, subset.kind, _count(subset.rows), subset.language, ", ".join(subset.groups),
         "; ".join(f"{model} {value}" for model, value in subset.published.items()))
        for subset in found.subsets
    ]  # fmt: skip
    kinds = [(kind, *_needs(KINDS[kind])) for kind in found.kinds]
    return [
        *facts, f"- version: {found.version}", *published, "",
        *table_lines(("sub-set", "kind", "rows", "language", "groups", "published"), rows),
        *table_lines(("kind", "score", "needs", "adds figures", "our rule was checked against"), kinds),
    ]  # fmt: skip


def _needs(kind: TaskKind) -> tuple[str, ...]:
    needs = ", ".join(kind.needs) or ("token log-probs" if kind.likelihood else "none")
    return kind.score, needs, ", ".join(kind.also), kind.rule


def _count(rows: int | None) -> str:
    return "not stated" if rows is None else f"{rows:,}"


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _without_engines(found: SpeechSet) -> str:
    return "token log-probs" if any(KINDS[kind].likelihood for kind in found.kinds) else "none"
