"""Consistency and thinking as a judge sees them. A judge that fails is None with a reason, never a middle score."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from covo_rl.prompt import Parsed, option_letter
from covo_rl.rewards.judge import Judge, JudgeError
from covo_rl.rewards.rules.criteria import CRITERIA
from covo_rl.rewards.templates import Template, VerdictError, load_template, read_verdict

CONSISTENCY, THINKING = "consistency.v1", "thinking.v1"
LogMissing = Callable[[int, str], None] | None


def template_hashes() -> dict[str, str]:
    """Template name -> sha256, for the run record."""
    return {name: load_template(name).sha256 for name in (CONSISTENCY, THINKING)}


def judge_consistency(
    judge: Judge, parsed: Sequence[Parsed], questions: Sequence[str | None],
    choices: Sequence[Sequence[str] | None], log_missing: LogMissing = None, log_extra: Any = None,
) -> list[float | None]:  # fmt: skip
    """1 for yes, 0 for no; 0 without asking where there is no reasoning or no answer."""
    template = load_template(CONSISTENCY)
    fields: list[dict[str, str] | None] = [
        {"question": asked or "", "options": _listed(options), "think": item.think, "answer": item.answer}
        if item.think and item.answer
        else None
        for item, asked, options in zip(parsed, questions, choices, strict=True)
    ]
    verdicts = _verdicts(judge, template, fields, ("consistent",), log_missing)
    if log_extra:
        log_extra("consistency_rationale", [verdict[1] if verdict else "" for verdict in verdicts])
    return [
        0.0 if given is None else None if verdict is None else float(verdict[0]["consistent"])
        for given, verdict in zip(fields, verdicts, strict=True)
    ]


def judge_thinking(
    judge: Judge, parsed: Sequence[Parsed], questions: Sequence[str | None],
    choices: Sequence[Sequence[str] | None], golds: Sequence[Any], facts: Sequence[Any],
    log_extra: Callable[[str, list], None] | None = None, log_missing: LogMissing = None,
) -> list[float | None]:  # fmt: skip
    """The share of five yes verdicts; 0 without asking where there is no reasoning. Rationales go to `log_extra`."""
    template = load_template(THINKING)
    fields: list[dict[str, str] | None] = []
    for item, asked, options, gold, known in zip(parsed, questions, choices, golds, facts, strict=True):
        given = {
            "question": asked or "", "options": _listed(options), "facts": _facts(known),
            "gold": "unknown" if gold is None else str(gold), "think": item.think or "",
            "answer": item.answer or "none",
        }  # fmt: skip
        fields.append(given if item.think else None)
    verdicts = _verdicts(judge, template, fields, CRITERIA, log_missing)
    if log_extra:
        log_extra("thinking_rationale", [verdict[1] if verdict else "" for verdict in verdicts])
        unmet = [", ".join(n for n, met in v[0].items() if not met) if v else "" for v in verdicts]
        log_extra("thinking_unmet", unmet)
    return [
        0.0 if given is None else None if verdict is None else sum(verdict[0].values()) / len(CRITERIA)
        for given, verdict in zip(fields, verdicts, strict=True)
    ]


def _verdicts(
    judge: Judge, template: Template, fields: Sequence[dict[str, str] | None], keys: tuple[str, ...],
    log_missing: LogMissing,
) -> list[tuple[dict[str, bool], str] | None]:  # fmt: skip
    asked = [i for i, given in enumerate(fields) if given is not None]
    filled = [template.fill(**(fields[i] or {})) for i in asked]
    replies = judge.ask([prompt for prompt, _ in filled])
    verdicts: list[tuple[dict[str, bool], str] | None] = [None] * len(fields)
    for i, (prompt, nonce), reply in zip(asked, filled, replies, strict=True):
        try:
            if isinstance(reply, JudgeError):
                raise reply
            verdicts[i] = read_verdict(reply, nonce, keys)
        except (JudgeError, VerdictError) as error:
            if isinstance(error, VerdictError) and hasattr(judge, "cache"):
                judge.cache.drop(prompt)  # type: ignore[attr-defined]
            if log_missing:
                log_missing(i, f"failed: judge: {error}")
    return verdicts


def _listed(options: Sequence[str] | None) -> str:
    return "\n".join(f"{option_letter(i)}. {option}" for i, option in enumerate(options or ())) or "none"


def _facts(known: Any) -> str:
    known = {name: value for name, value in (known or {}).items() if value is not None}
    return json.dumps(known, ensure_ascii=False, default=str) if known else "none given"
