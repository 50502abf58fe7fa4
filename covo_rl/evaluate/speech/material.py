"""What the engines have found about a row -> the row that a scorer of tasks.py takes, or why there is none.

Evidence(...)                          all that was found about the rows of an evaluation
material(row, place, evidence)         the scorer's row, or text that says why it cannot be scored
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from covo_rl.audio import AudioError
from covo_rl.audio.lengths import stored_length
from covo_rl.evaluate.speech.hearing import Said, channel_turns, sound_id, turn_words
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.questions import SWAPPED, is_answer_right
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem, Word
from covo_rl.evaluate.speech.sets import KINDS
from covo_rl.evaluate.speech.sounds import Sounds, activity, emotion_probability, nearest_choice
from covo_rl.evaluate.speech.texts import simplified
from covo_rl.evaluate.speech.timing import MODEL_GAP
from covo_rl.evaluate.speech.votes import Verdicts

Scored = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """By row's name what was said, by question's id what judges said, by model and id what scorer models said."""

    inputs: SpeechInputs
    said: Mapping[str, Sequence[Said]]
    verdicts: Mapping[str, Verdicts] = field(default_factory=dict)
    sounds: Sounds = field(default_factory=dict)

    def reply(self, row: SpeechItem) -> GivenReply:
        return self.inputs.reply(row) or GivenReply()

    def verdict(self, row: SpeechItem, place: int = 0, part: str = "") -> Verdicts | None:
        return self.verdicts.get(sound_id(row, place, part))

    def sound(self, name: str, row: SpeechItem, place: int = 0) -> Any:
        return self.sounds.get(name, {}).get(sound_id(row, place))


def material(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    """The row of a scorer, with the reason under `why` where what it needs is missing; text where no scorer takes it:
    it is held out, and missing."""
    found = _MATERIAL[KINDS[row.kind].task](row, place, evidence)
    return found if isinstance(found, str) else {"id": row.name, **found}


def _judged(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one, verdict = evidence.said[row.name][place], evidence.verdict(row, place)
    text = one.text if row.kind != "uro_srt" or one.audio is None else (one.text or "(heard by the judge)")
    if verdict is None:
        return {"reply_text": text, "judgements": None, "why": one.why or "not judged"}
    return {"reply_text": text, "judgements": verdict.texts, "why": verdict.missing}


def _styled(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    ability, verdict = str(row.columns["ability"]), evidence.verdict(row, place)
    if verdict is None:
        heard = evidence.said[row.name][place].audio is not None
        why = "no wording for this ability" if heard else "no audio"
        return {"ability": ability, "judgement": None, "why": why}
    texts = verdict.texts
    return {"ability": ability, "judgement": texts[-1] if texts else None, "why": verdict.missing}


def _voted(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    verdict = evidence.verdict(row, place)
    if verdict is None:
        return {"judgements": None, "why": evidence.said[row.name][place].why}
    return {"judgements": verdict.texts, "why": verdict.missing}


def _opened(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    found = _voted(row, place, evidence)
    assert isinstance(found, dict)
    judgements = found.pop("judgements")
    return {**found, "judgement": judgements[-1] if judgements else None}


def _written(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one = evidence.said[row.name][place]
    text = one.text
    if KINDS[row.kind].task == "tts" and text is not None and row.language == "zh":
        text = simplified(text)
    return {"reply_text": text, "reference": row.rounds[place].reference or "", "why": one.why}


def _refused(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one = evidence.said[row.name][place]
    return one.why if one.text is None else {"reply_text": one.text}


def _followed(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    found = {"instruction": row.columns["task_identifier"], "arguments": row.columns["kwargs"]}
    one = evidence.said[row.name][place]
    return {**found, "reply_text": one.text, "why": one.why}


def _reasoned(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one, verdict = evidence.said[row.name][place], evidence.verdict(row, place)
    if one.text is None:  # the official script is given replies alone
        return one.why
    right = is_answer_right(row, one)
    sums = [float(value) for value in verdict.values] if verdict else []
    maximum = float(sum(max(criterion["choices"]) for criterion in row.columns["rubric"]))
    return {"sums": sums, "maximum": maximum, "right": right, "why": verdict.missing if verdict else one.why}


def _emotional(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    found = _written(row, place, evidence)
    assert isinstance(found, dict)
    if found["reply_text"] is None:
        return {**found, "probability": None}
    probability = emotion_probability(row, evidence.sound("emotion", row, place))
    if isinstance(probability, str):
        return {**found, "probability": None, "why": probability}
    return {**found, "probability": probability}


def _likely(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    logps = evidence.reply(row).logps
    if logps is None:
        return "no log-probs"
    columns = row.columns
    known = {"in_vocabulary": columns["in_vocabulary"]} if columns.get("in_vocabulary") is not None else {}
    return {"pair": str(columns.get("pair", row.id)), "right": list(logps[0]), "wrong": list(logps[1]), **known}


def _chosen(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one = evidence.said[row.name][place]
    is_key = row.reference in row.choices
    why = one.why or ("no letter could be read" if is_key else "its answer_gt is none of its options")
    return {**row.columns, "response": one.text or "", "answer_gt": row.reference or "", "why": why}


def _chatted(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    replies = {}
    for part in ("", SWAPPED):
        verdict = evidence.verdict(row, place, part)
        texts = verdict.texts if verdict else None
        replies[part] = texts[-1] if texts else ""
    found = {"task_name": row.columns["task_name"], "gpt-score": replies[""], SWAPPED: replies[SWAPPED]}
    first = evidence.verdict(row, place)
    return {**found, "why": first.missing if first else evidence.said[row.name][place].why}


def _nearest(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one = evidence.said[row.name][place]
    found = {"reply_text": one.text, "reference": row.reference or "", "choices": list(row.choices), "why": one.why}
    if "embed" not in evidence.sounds:
        return found
    why = one.why or "no vectors of the reply and of every option that can be compared"
    return {**found, "nearest": nearest_choice(row, evidence.sounds["embed"]), "why": why}


# -- times -----------------------------------------------------------------------------------------------------------


def _timestamps(words: Sequence[Word]) -> list[dict[str, Any]]:
    return [{"text": word.text, "timestamp": [word.start, word.end]} for word in words]


def _took_over(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one, kind = evidence.said[row.name][place], row.kind.removeprefix("fdb_")
    if one.words is None:
        return one.why
    end = {"turn_taking": row.times.get("start"), "interruption": row.times.get("end")}.get(kind)
    return {"kind": kind, "words": _timestamps(one.words), **({} if end is None else {"turn_end": end})}


def _backchannelled(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one = evidence.said[row.name][place]
    if one.words is None:
        return one.why
    segments = activity(row, evidence.reply(row), evidence.sounds.get("vad", {}), "model")
    if isinstance(segments, str):
        return segments
    try:
        length = stored_length(row.clips[0])
    except AudioError as error:
        return str(error)
    if length is None:
        return f"{row.clips[0].path}: its length cannot be read; is it sound?"
    seconds, human = length[0] / length[1], row.times.get("distribution")
    return {"segments": segments, "words": _timestamps(one.words), "seconds": seconds, "human": human}


def _overlapped(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    answers, reply = evidence.sounds.get("vad", {}), evidence.reply(row)
    user, model = (activity(row, reply, answers, side) for side in ("user", "model"))
    if isinstance(user, str) or isinstance(model, str):
        given = evidence.said[row.name][place]
        return (given.why if given.audio is None else "") or (user if isinstance(user, str) else str(model))
    return {"user_vad": user, "model_vad": model, "why": "nothing is said after the user"}


def _turned(row: SpeechItem, place: int, evidence: Evidence) -> Scored | str:
    one, reply = evidence.said[row.name][place], evidence.reply(row)
    segments = reply.segments
    if segments is None and (turns := channel_turns(reply, "model")) is not None:
        segments = tuple(_segment(turn_words(turn)) for turn in turns)
    if segments is None and one.words is not None:
        segments = tuple(map(_segment, _joined(one.words)))
    if segments is None:
        return one.why
    return {"kind": row.kind.removeprefix("mtr_"), "segments": list(segments), "timestamps": dict(row.times)}


def _joined(words: Sequence[Word]) -> list[list[Word]]:
    """Words in runs without a pause above MODEL_GAP: a transcriber tells words, the benchmark counts segments."""
    runs: list[list[Word]] = []
    for word in sorted(words, key=lambda word: word.start):
        last = runs[-1][-1] if runs else None
        if last is not None and word.start - (last.start if last.end is None else last.end) <= MODEL_GAP:
            runs[-1].append(word)
        else:
            runs.append([word])
    return runs


def _segment(words: Sequence[Word]) -> dict[str, Any]:
    timed = [{"word": word.text, "start": word.start, "end": word.start if word.end is None else word.end}
             for word in words]  # fmt: skip
    text = " ".join(word.text.strip() for word in words)
    return {"timestamp": [timed[0]["start"], max(word["end"] for word in timed)], "text": text, "words": timed}


#: task -> material
_MATERIAL: dict[str, Callable[[SpeechItem, int, Evidence], Scored | str]] = {
    "rating": _judged, "yes_no": _judged, "srt": _judged, "style": _styled, "voicebench_open": _voted,
    "voicebench_qa": _voted, "open": _opened, "mcq": _written, "refusal": _refused, "instruction": _followed,
    "rubric": _reasoned, "repeat": _written, "emotion": _emotional, "asr": _written, "tts": _written,
    "translation": _written, "likelihood": _likely, "air_choice": _chosen, "air_chat": _chatted, "closed": _nearest,
    "take_over": _took_over, "backchannel": _backchannelled, "overlap": _overlapped, "mtr_turns": _turned,
}  # fmt: skip
