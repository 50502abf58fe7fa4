"""The rows of a sub-set, and what was found about them -> its block in a report, and a record of every row.

score_subset(subset, rows, evidence, engines, options)      (block, records)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from covo_rl.evaluate.speech.aggregate import LANGUAGES, answered_block
from covo_rl.evaluate.speech.engines import SpeechEngines
from covo_rl.evaluate.speech.fields import MalformedRow
from covo_rl.evaluate.speech.hearing import TIMED, Said, channel_turns
from covo_rl.evaluate.speech.material import Evidence, Scored, material
from covo_rl.evaluate.speech.questions import BEHAVIOURS, SWAPPED, is_answer_right
from covo_rl.evaluate.speech.rows import SpeechItem, round_count
from covo_rl.evaluate.speech.sets import KINDS, Subset
from covo_rl.evaluate.speech.tasks import score_set
from covo_rl.evaluate.speech.wer import uro_wer
from covo_rl.evaluate.summary import bootstrap_ratio
from covo_rl.rewards.replies import AnswerError
from covo_rl.types import visible

MOST_REASONS = 5  # why rows are missing, in a block
#: tasks that are told the language of their texts
_IN_LANGUAGE = ("repeat", "emotion", "asr", "tts", "translation")


def absent_engines(rows: Sequence[SpeechItem], evidence: Evidence, engines: SpeechEngines) -> str | None:
    """Which flags would give these rows of one kind their score; None where it has one."""
    replies = [one for row in rows for one in evidence.said[row.name]]
    has_audio = any(one.audio is not None for one in replies)
    has_reply = has_audio or any(one.text is not None for one in replies)
    timed = [reply for row in rows if (reply := evidence.reply(row)).turns is not None or any(reply.audio)]
    sides = ("model", "user") if KINDS[rows[0].kind].task == "overlap" else ("model",)
    told = all(channel_turns(reply, side) is not None for reply in timed for side in sides)
    wanted = {
        "transcriber": False, "judge": has_reply, "audio_judge": has_audio,
        "emotion": has_audio, "vad": not told,
    }  # fmt: skip
    needs = [name for flag in KINDS[rows[0].kind].needs if wanted[name := engine_name(flag)]]
    heard_by_words = KINDS[rows[0].kind].task != "overlap"  # which is scored by segments
    unheard = dict.fromkeys(one.why for one in replies if one.unheard and heard_by_words)
    missing = engines.missing([name for name in needs if name != "transcriber"])
    return "; ".join([*unheard, *missing.values()]) or None


def engine_name(flag: str) -> str:
    """`--audio-judge` -> audio_judge, `--scorer-model vad` -> vad: as engines.missing names them."""
    return flag.removeprefix("--scorer-model ").removeprefix("--").replace("-", "_")


def score_subset(
    subset: Subset, rows: Sequence[SpeechItem], evidence: Evidence, engines: SpeechEngines, options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`options` are keyword arguments of score_set by task. `n` is always the number of rows, `missing` of those
    without what their score needs."""
    kind, sources = KINDS[subset.kind], Counter(one.source for row in rows for one in evidence.said[row.name])
    facts = {"kind": subset.kind, "rule": kind.rule, "replies": {name: n for name, n in sources.items() if name}}
    if (absent := absent_engines(rows, evidence, engines)) is not None:
        silent = sum(all(one.audio is None and one.text is None for one in evidence.said[row.name]) for row in rows)
        block = {"score": None, "n": len(rows), "missing": silent, "absent": absent, **facts}
        return block, [_record(row, evidence, None, absent) for row in rows]
    more = dict(options.get(kind.task, {}))
    if kind.task in _IN_LANGUAGE:
        more["language"] = subset.language
    kept, records = [], []
    for row in rows:
        parts = [material(row, place, evidence) for place in range(round_count(row))]
        scores, why = [], ""
        for part in parts:
            score, reason = _alone(kind.task, part, more)
            why = why or reason
            scores.append(score)
            if isinstance(part, dict) and score is not _UNSCORABLE:
                kept.append(part)
        known = [score for score in scores if isinstance(score, float)]
        replied = kind.likelihood or any(one.text is not None or one.audio for one in evidence.said[row.name])
        why = why or ("" if replied else evidence.said[row.name][0].why)
        records.append(_record(row, evidence, sum(known) / len(known) if known else None, why))
    block = _whole(kind.task, kept, more, records)
    missing = [record["why"] for record in records if record["why"]]
    rounds = {"rounds": len(kept)} if kind.dialogue and len(kept) != len(rows) else {}
    reasons = dict(Counter(missing).most_common(MOST_REASONS))
    block |= {"n": len(rows), "missing": len(missing), **rounds, **({"missing_why": reasons} if reasons else {})}
    return {**block, **facts, **more_figures(subset, rows, evidence)}, records


_UNSCORABLE = "unscorable"


def _alone(task: str, part: Scored | str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """(a row's own score, why it is missing)."""
    if isinstance(part, str):
        return _UNSCORABLE, part
    try:
        block = _scored(task, [part], options)
    except MalformedRow as error:
        what = str(error).rpartition("\n")[2].strip()
        return _UNSCORABLE, what.removeprefix(f"- row {visible(part['id'])}: ")
    score = block["score"]
    why = (part.get("why") or "it could not be read") if block.get("missing") else ""
    return (None if score is None else float(score)), why


def _scored(task: str, parts: Sequence[Scored], options: Mapping[str, Any]) -> dict[str, Any]:
    if task != "air_chat":
        return score_set(task, parts, **options)
    swapped = [{"task_name": part["task_name"], "gpt-score": part[SWAPPED]} for part in parts]
    block = score_set(task, parts, swapped=swapped)
    means = list(block["groups"].values())
    return {**block, "score": means[0] if len(means) == 1 else block["score"]}


def _whole(
    task: str, kept: Sequence[Scored], options: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    if not kept:
        return {"score": None}
    block = _scored(task, kept, options)
    block = {name: value for name, value in block.items() if name not in ("n", "missing")}
    scores = [record["score"] for record in records if record["score"] is not None]
    if "ci95" not in block and scores and task not in ("overlap", "translation"):
        block["ci95"] = list(bootstrap_ratio(scores))
    return block


def _record(row: SpeechItem, evidence: Evidence, score: float | None, why: str) -> dict[str, Any]:
    """A line of scores.jsonl: everything that a number rests on."""
    said = evidence.said[row.name]
    votes = [evidence.verdict(row, place, part) for place in range(len(said)) for part in ("", SWAPPED)]
    return {
        "id": row.name, "subset": row.subset, "kind": row.kind, "score": score, "why": why,
        "said": [one.text for one in said], "source": [one.source for one in said],
        "written": [one.written for one in said], "audio": [one.audio for one in said],
        "judgements": [vote.texts for vote in votes if vote is not None],
    }  # fmt: skip


# -- figures beside the score ----------------------------------------------------------------------------------------


def more_figures(subset: Subset, rows: Sequence[SpeechItem], evidence: Evidence) -> dict[str, Any]:
    """UTMOS of the replies' sound, the error rate of that sound against the model's own text, the relevance of what was
    said after an interruption, the accuracy of answers whose reasoning is scored: each where there is something to
    compute it from."""
    figures: dict[str, Any] = {}
    if natural := list(_naturalness(rows, evidence)):
        figures["utmos"] = answered_block(natural)
    if subset.kind.startswith("uro_") and subset.language in LANGUAGES:
        rates = [
            rate for row in rows for one in evidence.said[row.name] if (rate := _own_rate(subset, one)) is not None
        ]
        if rates:
            figures["asr_wer"] = answered_block(rates, scale=100)
    if subset.kind == "fdb_interruption":
        verdicts = [evidence.verdict(row) for row in rows]
        asked = [verdict for verdict in verdicts if verdict is not None]
        if asked:
            figures["relevance"] = answered_block([float(v.values[0]) if v.values else None for v in asked])
    if subset.kind == "mmar_rubrics":
        answers = [(row, one) for row in rows for one in evidence.said[row.name] if one.text is not None]
        right = [float(is_answer_right(row, one)) for row, one in answers]
        figures["accuracy"] = answered_block(right, scale=100, share=True)
    if subset.kind == "fdb_overlap" and (found := _behaviours(rows, evidence)):
        figures["behaviour"] = found
    if KINDS[subset.kind].task in TIMED:
        figures["from"] = sorted({one.source for row in rows for one in evidence.said[row.name] if one.source})
    return figures


def _naturalness(rows: Iterable[SpeechItem], evidence: Evidence) -> Iterable[float | None]:
    for row in rows:
        for place in range(len(evidence.said[row.name])):
            answer = evidence.sound("utmos", row, place)
            if isinstance(answer, AnswerError) or (answer is not None and not isinstance(answer["score"], float)):
                yield None
            elif answer is not None:
                yield answer["score"]


def _behaviours(rows: Iterable[SpeechItem], evidence: Evidence) -> dict[str, Any]:
    """Shares of the labels in percent, over the rows that were judged; nothing where none was asked about."""
    asked = [verdict for row in rows if (verdict := evidence.verdict(row)) is not None]
    labels = [verdict.values[0] for verdict in asked if verdict.values]
    shares = {label: 100 * labels.count(label) / len(labels) for label in BEHAVIOURS if labels}
    return {**shares, "n": len(asked), "missing": len(asked) - len(labels)} if asked else {}


def _own_rate(subset: Subset, one: Said) -> float | None:
    """Of what was heard against what the model wrote, where it did both."""
    if one.source != "asr" or one.written is None or one.text is None:
        return None
    return uro_wer(subset.language, one.written, one.text)
