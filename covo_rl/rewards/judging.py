"""What a judge is asked: versioned prompts, filled safely, whose replies are read strictly.

A judge that fails is None with a reason, never a middle score.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from covo_rl.audio import AudioError, content_key
from covo_rl.prompt import Parsed, option_letter
from covo_rl.resolve import find
from covo_rl.rewards.columns import LazyClip
from covo_rl.rewards.judge import Judge, JudgeError
from covo_rl.rewards.rules.criteria import CRITERIA
from covo_rl.types import Clip, shown

#: component -> what the judge is asked to say yes or no to
KEYS = {"consistency": ("consistent",), "thinking": CRITERIA, "emotion": ("expressed",), "content": ("same",)}
MAX_FIELD = 8000  # characters of a completion that a judge is shown
_FIELD = re.compile(r"\{\{ (\w+) \}\}")


class VerdictError(ValueError):
    """The judge's reply is not a verdict."""


@dataclass(frozen=True)
class Question:
    """What a judge is asked about a row: a filled template, its nonce, and the clips that it is sent; or, in place of
    all of these, why it cannot be asked."""

    prompt: str = ""
    nonce: str = ""
    clips: Sequence[Clip] = ()
    problem: Exception | None = None

    @classmethod
    def about(cls, template: str, clips: Sequence[Clip] = (), **fields: str) -> Question:
        """The template of this name. Clips are in the nonce by content: other clips are another prompt."""
        try:
            if clips:
                fields["clips"] = " ".join(map(content_key, clips))
            return cls(*fill_template(load_template(template), **fields), clips)
        except AudioError as error:
            return cls(problem=error)


def judge_scores(
    judge: Judge, component: str, rows: Sequence[tuple], log_missing: Callable[[int, str], None] | None = None,
    log_extra: Callable[[str, list], None] | None = None, log_metric: Callable[[str, float], None] | None = None,
    clips: Sequence[Sequence[LazyClip]] | None = None,
) -> list[float | None]:  # fmt: skip
    """The share of yes verdicts, in [0, 1]; reasons and what was not met go to `log_extra`.

    Rows are (parsed, question, choices) and for thinking also (right answer, facts). Without reasoning, or for
    consistency without an answer, the score is 0 and nothing is asked. A judge that hears is sent the `clips`.
    """
    hears = clips is not None and getattr(judge, "hears", False)
    questions: dict[int, Question] = {}
    for i, row in enumerate(rows):
        if row[0].think and (row[0].answer or component == "thinking"):
            sounds = [lazy.clip for lazy in clips[i]] if hears and clips else []
            name = f"{component}{'_audio' * bool(sounds)}.v1"
            questions[i] = Question.about(name, sounds, **_fields(*row))
    return ask_verdicts(judge, component, questions, len(rows), log_missing, log_extra, log_metric, hears)


def ask_verdicts(
    judge: Judge, component: str, questions: Mapping[int, Question], count: int,
    log_missing: Callable[[int, str], None] | None = None, log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None, hears: bool = True,
) -> list[float | None]:  # fmt: skip
    """Scores of `count` rows, 0 where there is no question; one that fails is None. `hears`: clips are sent."""
    asked = {i: question for i, question in questions.items() if question.problem is None}
    texts, keys = [question.prompt for question in asked.values()], KEYS[component]
    sounds = [question.clips for question in asked.values()]
    answers = judge.ask(texts, sounds) if hears else judge.ask(texts)  # type: ignore[call-arg]
    replies = dict(zip(asked, answers, strict=True))
    scores: list[float | None] = [0.0] * count
    reasons, unmet = [""] * count, [""] * count
    for i, question in questions.items():
        reply = replies.get(i)
        try:
            if question.problem is not None or isinstance(reply, JudgeError):
                raise JudgeError(str(question.problem or reply))
            if not isinstance(reply, str):  # of a judge of the user's
                raise VerdictError(f"the reply is {type(reply).__name__}, not text")
            verdict, reasons[i] = read_verdict(reply, question.nonce, keys)
            scores[i] = sum(verdict.values()) / len(keys)
            unmet[i] = ", ".join(name for name, met in verdict.items() if not met)
        except (JudgeError, VerdictError) as error:
            scores[i] = None
            if isinstance(error, VerdictError) and hasattr(judge, "forget"):
                judge.forget(question.prompt, *filter(None, [question.clips]))  # type: ignore[attr-defined]
            if log_missing:
                log_missing(i, f"failed: judge: {error}")
    if log_metric and (faults := getattr(judge, "cache_faults", 0)):
        log_metric(f"{component}_judge_cache_faults", faults)
    if log_extra:
        log_extra(f"{component}_reason", reasons)
        if component == "thinking":
            log_extra("thinking_unmet", unmet)
    return scores


def _fields(parsed: Parsed, question: str | None, choices: Sequence[str] | None, *truth: Any) -> dict[str, str]:
    options = "\n".join(f"{option_letter(i)}. {option}" for i, option in enumerate(choices or ()))
    fields = {"question": question or "", "options": options or "none"}
    fields |= {"think": parsed.think or "", "answer": parsed.answer or "none"}
    if truth:
        gold, facts = truth
        facts = {name: value for name, value in (facts or {}).items() if value is not None}
        fields["gold"] = "unknown" if gold is None else str(gold)
        fields["facts"] = json.dumps(facts, ensure_ascii=False, default=str) if facts else "none given"
    return fields


def fill_template(template: str, most: int | None = MAX_FIELD, /, **fields: str) -> tuple[str, str]:
    """(prompt, nonce). Markers carry a nonce made from the content, so that the content cannot close them. Of a field
    that has more characters than `most` the middle is left out, which the prompt says.

    The nonce is the same for the same content, so that replies can be cached; a completion that contained its own
    hash is not something a policy can produce.
    """
    material = json.dumps([template, fields], sort_keys=True)
    nonce = hashlib.sha256(material.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    values = {"begin": f"<<<{nonce}", "end": f"{nonce}>>>", "nonce": nonce}
    for name, text in fields.items():
        text = text.encode("utf-8", "replace").decode()
        if most is not None and (excess := len(text) - most) > 0:
            text = f"{text[: most // 2]}\n[{excess} characters left out]\n{text[-most // 2 :]}"
        values[name] = text
    return _FIELD.sub(lambda match: values[match.group(1)], template), nonce


@cache
def load_template(name: str) -> str:
    """`consistency.v1` -> rewards/judge/consistency.v1.txt of the user's folder, the checkout or the bundled copy."""
    return find("rewards", f"judge/{name}.txt").read_text(encoding="utf-8")


def template_hashes(hears: bool = False) -> dict[str, str]:
    """Template name -> sha256, for the run record; `hears`: of a judge that is sent the clips."""
    names = ["consistency.v1", "content.v1", *(["thinking_audio.v1", "emotion_audio.v1"] if hears else ["thinking.v1"])]
    return {name: hashlib.sha256(load_template(name).encode()).hexdigest() for name in names}


def read_verdict(reply: str, nonce: str, keys: tuple[str, ...]) -> tuple[dict[str, bool], str]:
    """(key -> yes or no, rationale) from a reply that must be exactly one JSON object with these keys and the nonce.

    Raises:
        VerdictError: anything else; a guess would be a reward for nothing.
    """
    text = reply.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(\{.*\})\s*```", text, re.DOTALL)
    try:
        content = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError) as error:
        raise VerdictError(f"the reply is not one JSON object: {reply[:120]!r}") from error
    if not isinstance(content, dict) or set(content) != {"nonce", "rationale", *keys}:
        raise VerdictError(f"expected the keys nonce, rationale, {', '.join(keys)}: {reply[:120]!r}")
    if content["nonce"] != nonce:
        raise VerdictError("the reply is about something else: its nonce is wrong")
    verdict = {}
    for name in keys:
        word = content[name].strip().lower() if isinstance(content[name], str) else content[name]
        if not isinstance(word, (str, bool)) or word not in ("yes", "no", True, False):
            raise VerdictError(f"{name} is {shown(content[name])}, expected yes or no")
        verdict[name] = word in ("yes", True)
    return verdict, shown(content["rationale"], MAX_FIELD)
