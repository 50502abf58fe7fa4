"""Kind of a task -> the scorer of all rows of a set.

    score_set("rating", [{"reply_text": "Hello", "judgements": ["4", "5", "4"]}])     -> {"score": 86.67, "n": 1, ...}
    score_set("asr", rows, language="zh")

Rows hold what engines have found; TASKS says which. Every block has `score` (percent, unless it is a rating's mean),
`n` and `missing`, rows without what their score needs; where a published script counts those otherwise, `official` and
`answered_only` are both there (aggregate.mean_block).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from covo_rl.evaluate.sets import strict_match
from covo_rl.evaluate.speech.aggregate import answered_block, known_mean, mean_block, vstyle_conclusion
from covo_rl.evaluate.speech.choices import air_chat, air_chat_both, air_foundation
from covo_rl.evaluate.speech.fields import MalformedRow, checked, field, optional_text
from covo_rl.evaluate.speech.instructions import follows
from covo_rl.evaluate.speech.judged import (
    REFUSALS,
    Judgement,
    mmau_pro_rating,
    rubric_score,
    uro_judgement,
    voicebench_letter,
    voicebench_majority,
    voicebench_rating,
    voicebench_refused,
    vstyle_score,
    vstyle_score_text,
)
from covo_rl.evaluate.speech.likelihood import pair_report
from covo_rl.evaluate.speech.scorers import Row
from covo_rl.evaluate.speech.turns import backchannel_report, mtr_report, overlap_report, take_over_report
from covo_rl.evaluate.speech.wer import (
    REPEATED,
    asr_report,
    emotion_score,
    repeat_figures,
    seed_tts_wer,
    uro_wer,
)
from covo_rl.evaluate.summary import bootstrap_ratio, wilson
from covo_rl.types import visible

SHOWN_ROWS = 50  # of those that cannot be scored, in a message


@dataclass(frozen=True)
class SpeechTask:
    """`score(rows, **options)` -> a block. `row`: keys of a row, then options."""

    score: Callable[..., dict[str, Any]]
    row: str


def _replies(row: Row) -> list[str] | None:
    """The judge's; None where it failed."""
    given = row.get("judgements")
    return None if given is None else [
        checked(reply, "a reply of the judge", str) for reply in checked(given, "'judgements'", Sequence)
    ]  # fmt: skip


def _both(value: float | None) -> Judgement:
    return Judgement(value, value)


# -- URO-Bench, VStyle, VoiceBench, MMAU-Pro, MMAR-Rubrics: judged replies --------------------------------------------


def _judged(mode: str, scale: float) -> Callable[[Sequence[Row]], dict[str, Any]]:
    """A row whose text is null, nothing was replied or heard, is missing; the official script makes it 0."""

    def judgement(row: Row) -> Judgement:
        if row.get("reply_text", "") is None:
            return Judgement(0.0, None)
        return uro_judgement(mode, _replies(row), field(row, "reply_text", str))

    return lambda rows: mean_block(map(judgement, rows), scale=scale)


def _styled(rows: Sequence[Row]) -> dict[str, Any]:
    """VStyle's weighted mean, 1 to 5: `official` of whatever float() reads, `score` of the scale alone."""
    replies = [optional_text(row, "judgement") for row in rows]
    abilities = [field(row, "ability", str) for row in rows]
    texts = ["" if reply is None else vstyle_score_text(reply) for reply in replies]
    scores = [None if reply is None else vstyle_score(reply) for reply in replies]
    official, ours = (
        vstyle_conclusion(
            [{"model_name": "", "ability": a, "gemini_score": s} for a, s in zip(abilities, said, strict=True)]
        )
        for said in (texts, scores)
    )
    conclusion = ours.get("", {})
    return {
        "score": float(conclusion["overall"]) if conclusion.get("ability") else None, "n": len(rows),
        "missing": scores.count(None), "groups": conclusion, "official": official.get(""),
        "out_of_range": sum(bool(text) and score is None for text, score in zip(texts, scores, strict=True)),
    }  # fmt: skip


def _named(rows: Sequence[Row], patterns: Sequence[str] | None = None) -> dict[str, Any]:
    """VoiceBench's choices: what is not read is wrong, and `unread`; there the script guesses, so with it, and without
    the user's patterns, there is no official number."""
    letters = [voicebench_letter(optional_text(row, "reply_text") or "", patterns) for row in rows]
    right = [float(a == field(row, "reference", str)) for a, row in zip(letters, rows, strict=True)]
    judged = (
        Judgement(None if letter is None or patterns is None else value, value)
        for letter, value in zip(letters, right, strict=True)
    )
    missing = sum(row.get("reply_text") is None for row in rows)
    return {**mean_block(judged, scale=100, share=True), "unread": letters.count(None), "missing": missing}


def _refused(rows: Sequence[Row], phrases: Sequence[str] | None = None) -> dict[str, Any]:
    """Without the user's phrases: of two of them, and no official number."""
    values = [float(voicebench_refused(field(row, "reply_text", str), phrases or REFUSALS)) for row in rows]
    return mean_block((Judgement(value if phrases else None, value) for value in values), scale=100, share=True)


def _rated(row: Row) -> Judgement:
    """VoiceBench's open questions: a reply that cannot be read ends the script; ours reads what the scale has."""
    scores = [voicebench_rating(reply) for reply in _replies(row) or ()]
    ours = known_mean(score for score in scores if score is not None and 1 <= score <= 5)
    return Judgement(
        None if any(score is None or not isfinite(score) for score in scores) else known_mean(scores), ours
    )


def _voted(row: Row) -> Judgement:
    replies = _replies(row)
    vote = None if not replies else voicebench_majority(replies)
    return _both(None if vote is None else float(vote))


def _opened(row: Row) -> Judgement:
    reply = optional_text(row, "judgement")
    return Judgement(3.0 / 5, None) if reply is None else mmau_pro_rating(reply)


def _followed(row: Row) -> Judgement:
    """A row without a reply is wrong, and missing."""
    instruction, arguments = field(row, "instruction", str), field(row, "arguments", Mapping)
    right = float(follows(instruction, optional_text(row, "reply_text") or "", arguments))
    return Judgement(right, None if row.get("reply_text") is None else right)


def _reasoned(row: Row) -> Judgement:
    sums = [
        None if points is None else checked(points, "a sum of points", float) for points in field(row, "sums", Sequence)
    ]
    return rubric_score(sums, field(row, "maximum", float), field(row, "right", bool))


def _each(judgement: Callable[[Row], Judgement], **options: Any) -> Callable[[Sequence[Row]], dict[str, Any]]:
    return lambda rows: mean_block((judgement(row) for row in rows), **options)


# -- transcripts -----------------------------------------------------------------------------------------------------


def _repeat(rows: Sequence[Row], language: str) -> dict[str, Any]:
    """URO-Bench: a row without a reply has the text " " there, and so does it here."""
    heard = [optional_text(row, "reply_text") for row in rows]
    rates = [
        uro_wer(language, reply or " ", field(row, "reference", str)) for reply, row in zip(heard, rows, strict=True)
    ]
    scores = [100 * (1 - rate) if rate <= REPEATED else 0.0 for rate in rates]  # whose mean is the score
    interval = list(bootstrap_ratio(scores)) if scores else None
    return {**repeat_figures(rates), "ci95": interval, "n": len(rows), "missing": heard.count(None)}


def _emotional(rows: Sequence[Row], language: str) -> dict[str, Any]:
    def score(row: Row) -> Judgement:
        if row.get("probability") is None:
            return Judgement(0.0, None)
        wer = uro_wer(language, field(row, "reply_text", str), field(row, "reference", str))
        return _both(emotion_score(field(row, "probability", float), wer))

    return mean_block(map(score, rows))


def _transcribed(rows: Sequence[Row], language: str, numbers: str = "written") -> dict[str, Any]:
    references = [field(row, "reference", str) for row in rows]
    return asr_report(language, references, [optional_text(row, "reply_text") for row in rows], numbers)


def _synthesised(rows: Sequence[Row], language: str) -> dict[str, Any]:
    """Seed-TTS-eval: sounds that are missing are skipped officially, and all wrong in `score_all`."""
    heard = [optional_text(row, "reply_text") for row in rows]
    rates = [None if reply is None else 100 * seed_tts_wer(language, field(row, "reference", str), reply)
             for reply, row in zip(heard, rows, strict=True)]  # fmt: skip
    return {**answered_block(rates), "score_all": known_mean(100.0 if rate is None else rate for rate in rates)}


def _translated(rows: Sequence[Row], language: str) -> dict[str, Any]:
    """Corpus BLEU of sacrebleu, by its tokeniser for Chinese or 13a; a row without a reply is an empty translation."""
    try:
        import sacrebleu  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'covo-rl[speech-eval]'") from error
    given = [optional_text(row, "reply_text") for row in rows]
    metric = sacrebleu.BLEU(tokenize="zh" if language == "zh" else "13a")
    references = [field(row, "reference", str) for row in rows]
    score = metric.corpus_score([text or "" for text in given], [references]).score if rows else None
    signature = str(metric.get_signature()) if rows else None
    return {"score": score, "n": len(rows), "missing": given.count(None), "signature": signature}


# -- choices ---------------------------------------------------------------------------------------------------------


def _chosen(rows: Sequence[Row]) -> dict[str, Any]:
    """AIR-Bench: over the rows that were read, as its script; over all rows in `score_all`."""
    report = air_foundation(rows, strict=False)
    read, right = (sum(task[name] for task in report["tasks"].values()) for name in ("n", "correct"))
    return {
        "score": 100 * right / read if read else None,
        "ci95": [100 * end for end in wilson(right, read)] if read else None,
        "n": len(rows), "missing": len(rows) - read, "score_all": 100 * right / len(rows) if rows else None, **report,
    }  # fmt: skip


def _nearest(rows: Sequence[Row]) -> dict[str, Any]:
    """MMAU-Pro's closed questions: the option nearest to the reply by embedding (`nearest`, its text), the official
    rule, where rows have it, and the strict match beside it; without it the strict match alone is the score."""
    replies = [optional_text(row, "reply_text") for row in rows]
    right = [
        float(strict_match(reply, field(row, "choices", Sequence), field(row, "reference", str)))
        for reply, row in zip(replies, rows, strict=True)
    ]
    pairs = zip(replies, right, strict=True)
    strict = mean_block((Judgement(hit, None if reply is None else hit) for reply, hit in pairs), scale=100, share=True)
    if not any("nearest" in row for row in rows):
        return {**strict, "scored_by": "strict match"}
    near = [None if row.get("nearest") is None else float(row["nearest"] == row["reference"]) for row in rows]
    return {**answered_block(near, scale=100, share=True), "scored_by": "nearest option by embedding", "strict": strict}


def _chatted(rows: Sequence[Row], swapped: Sequence[Row]) -> dict[str, Any]:
    """AIR-Bench chat: `swapped` are the same replies judged in the other order."""
    plain, other = air_chat(rows, swapped=False, strict=False), air_chat(swapped, swapped=True, strict=False)
    means, missing = air_chat_both(plain, other), plain["fail_num"] + other["fail_num"]
    return {"score": means.get("average"), "n": len(rows) + len(swapped), "missing": missing, "groups": means,
            "plain": plain, "swapped": other}  # fmt: skip


TASKS: dict[str, SpeechTask] = {
    "rating": SpeechTask(_judged("rating", 20), "reply_text, judgements (null: the judge failed)"),
    "yes_no": SpeechTask(_judged("yes_no", 100), "reply_text, judgements"),
    "srt": SpeechTask(_judged("srt", 20), "reply_text, judgements (one)"),
    "style": SpeechTask(_styled, "judgement, ability"),
    "voicebench_open": SpeechTask(_each(_rated), "judgements"),
    "voicebench_qa": SpeechTask(_each(_voted, scale=100, share=True), "judgements"),
    "mcq": SpeechTask(_named, "reply_text, reference (a letter); patterns"),
    "refusal": SpeechTask(_refused, "reply_text; phrases"),
    "open": SpeechTask(_each(_opened, scale=100), "judgement"),
    "instruction": SpeechTask(_each(_followed, scale=100, share=True), "reply_text, instruction, arguments"),
    "rubric": SpeechTask(_each(_reasoned, scale=100), "sums, maximum, right"),
    "repeat": SpeechTask(_repeat, "reply_text, reference; language"),
    "emotion": SpeechTask(_emotional, "reply_text, reference, probability; language"),
    "asr": SpeechTask(_transcribed, "reply_text, reference; language, numbers"),
    "tts": SpeechTask(_synthesised, "reply_text, reference; language"),
    "likelihood": SpeechTask(pair_report, "pair, right, wrong, voice?, in_vocabulary?, modality?; normalise"),
    "translation": SpeechTask(_translated, "reply_text, reference; language (of the translation)"),
    "closed": SpeechTask(_nearest, "reply_text, reference, choices, nearest?"),
    "air_choice": SpeechTask(_chosen, "task_name, dataset_name, choice_a to choice_d, answer_gt, response"),
    "air_chat": SpeechTask(_chatted, "task_name, gpt-score; swapped (rows)"),
    "mtr_turns": SpeechTask(mtr_report, "kind, segments, timestamps"),
    "take_over": SpeechTask(take_over_report, "kind, words, turn_end"),
    "overlap": SpeechTask(overlap_report, "user_vad, model_vad"),
    "backchannel": SpeechTask(backchannel_report, "segments, words, seconds, human?"),
}


def score_set(kind: str, rows: Sequence[Row], **options: Any) -> dict[str, Any]:
    """The block of all rows of one kind.

    Raises:
        ValueError: no such kind.
        MalformedRow: rows that the kind cannot score: their number, and the first of them by id or place.
    """
    if kind not in TASKS:
        raise ValueError(f"task {kind!r}: there are {', '.join(TASKS)}")
    for index, row in enumerate(rows):
        checked(row, f"row {index}", Mapping)
    try:
        return TASKS[kind].score(rows, **options)
    except MalformedRow:
        problems = _problems(kind, rows, options)
        if not problems:  # not the fault of a row alone
            raise
        more = [f"  - and {len(problems) - SHOWN_ROWS} more"] if len(problems) > SHOWN_ROWS else []
        lines = [f"{len(problems)} rows of kind {kind} cannot be scored:", *problems[:SHOWN_ROWS], *more]
        raise MalformedRow("\n".join(lines)) from None


def _problems(kind: str, rows: Sequence[Row], options: Mapping[str, Any]) -> list[str]:
    """Each row tried alone."""
    problems = []
    for index, row in enumerate(rows):
        try:
            TASKS[kind].score([row], **options)
        except MalformedRow as error:
            problems.append(f"  - row {visible(row.get('id', index))}: {error}")
    return problems
