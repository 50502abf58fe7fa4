"""Official files of questions about sound whose replies are text: AIR-Bench, MMAU-Pro, MMAR with rubrics.

AIR-Bench   Foundation_meta.json or Chat_meta.json (a list), or a file of results (JSON lines): uniq_id?, task_name,
            dataset_name, path, question, choice_a ... choice_d (foundation), meta_info? (chat), answer_gt, response?
            (the reply); audio at TASK_DATASET/path, of Audio_Grounding as .flac
MMAU-Pro    test.parquet: id?, audio_path (one or several), question, answer, choices, category, and of the category
            "instruction following" task_identifier, kwargs; model_output? (the reply)
MMAR        MMAR-meta.jsonl of 2026-02: id, audio_path, question, choices, answer, thinking? (how one comes to it), and
            rubric, a list of criteria: name, scoring_point, choices (the scores that there are)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from covo_rl.data.read import printable
from covo_rl.evaluate.speech.reading import SetReader
from covo_rl.evaluate.speech.row_fields import RowFields, is_finite
from covo_rl.evaluate.speech.rows import GivenReply, SpokenRound
from covo_rl.evaluate.speech.sets import Subset

_OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")
#: MMAU-Pro's categories that are no choice between options
_MMAU_PRO_KINDS = {"open": "mmau_pro_open", "instruction following": "mmau_pro_instruction"}


def read_air(reader: SetReader) -> None:
    """AIR-Bench; every pair of task and dataset is a sub-set, as its scripts group them."""
    for path, (part, *_) in reader.parts():
        for fields in reader.lines(path, "path"):
            task, dataset = fields.text("task_name"), fields.text("dataset_name")
            name = f"{task}_{dataset}"
            kind = "air_foundation" if any(option in fields.values for option in _OPTIONS) else "air_chat"
            if kind != part.kind and not fields.failed:
                fields.wrong(f"{'no ' if kind == 'air_chat' else ''}choice_a ... in a file of {part.name}")
            subset = Subset(name, part.kind, groups=(part.name, task))
            sound = fields.maybe("path") or ""
            places = [f"{name}/{sound}", sound]
            if task == "Audio_Grounding":
                places.insert(0, f"{name}/{sound.rpartition('.')[0] or sound}.flac")
            choices = [fields.maybe(option) for option in _OPTIONS]
            while choices and choices[-1] is None:
                choices.pop()
            rounds = [SpokenRound(fields.clip("path", *places), fields.text("question"), fields.text("answer_gt"))]
            row = reader.add(fields, subset, rounds, row_id=fields.maybe("uniq_id"),
                             choices=["" if choice is None else choice for choice in choices])  # fmt: skip
            reader.keep_reply(row, GivenReply(texts=(fields.maybe("response"),)))


def read_mmau_pro(reader: SetReader) -> None:
    """MMAU-Pro, a sub-set a category. As in the official script, a closed question without options is left out."""
    unasked = []
    for path, _ in reader.parts():
        for fields in reader.lines(path, "audio_path"):
            category = fields.text("category")
            kind = _MMAU_PRO_KINDS.get(category, "mmau_pro_closed")
            choices = fields.texts("choices")
            if kind == "mmau_pro_closed" and len(choices) < 2 and not fields.failed:
                unasked.append(fields.maybe("id") or f"{fields.index}")
                continue
            columns: dict[str, Any] = {}
            if kind == "mmau_pro_instruction":
                columns = {"task_identifier": fields.text("task_identifier"), "kwargs": _arguments(fields)}
            is_rules = kind == "mmau_pro_instruction"
            answer = fields.maybe("answer") if is_rules else fields.text("answer")
            rounds = [SpokenRound(fields.clips("audio_path"), fields.text("question"), answer)]
            subset = Subset(category, kind, groups=("closed",) if kind == "mmau_pro_closed" else ())
            row = reader.add(fields, subset, rounds, row_id=fields.maybe("id"), choices=choices, columns=columns)
            reader.keep_reply(row, GivenReply(texts=(fields.maybe("model_output"),)))
    if unasked:
        listed = ", ".join(unasked[:20])
        reader.notes.append(
            f"closed questions with fewer than two options, which are not scored: {len(unasked)} ({listed})"
        )


def _arguments(fields: RowFields) -> Mapping[str, Any]:
    """The parameters of a rule: an object, also as JSON text, without those that are null (parquet fills them in)."""
    value = fields.values.get("kwargs")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            fields.wrong(f"kwargs is {printable(value)}, which is not JSON")
            return {}
    if value is not None and not isinstance(value, Mapping):
        fields.wrong(f"kwargs is {printable(value)}, not an object")
        return {}
    return {name: item for name, item in (value or {}).items() if item is not None}


def read_mmar_rubrics(reader: SetReader) -> None:
    """MMAR with the rubric of each question, which the edition of 2026-02 has."""
    for path, (subset, *_) in reader.parts():
        for fields in reader.lines(path, "audio_path"):
            choices = fields.texts("choices")
            answer = fields.text("answer")
            columns = {"rubric": _rubric(fields), "thinking": fields.maybe("thinking")}
            if answer not in choices and not fields.failed:
                fields.wrong(f"answer {printable(answer)} is not among its choices")
            rounds = [SpokenRound(fields.clip("audio_path"), fields.text("question"), answer)]
            reader.add(fields, subset, rounds, row_id=fields.text("id"), choices=choices, columns=columns)


def _rubric(fields: RowFields) -> list[dict[str, Any]]:
    if not fields.has("rubric"):
        fields.wrong("no rubric: the file of 2026-02 (MMAR-meta.jsonl of the repository) has one in each row")
        return []
    rubric = []
    for part in fields.parts("rubric"):
        scores = part.values.get("choices")
        if not isinstance(scores, list) or not scores or not all(is_finite(score) and score >= 0 for score in scores):
            part.wrong(f"choices is {printable(scores)}, not a list of scores from 0 on")
        rubric.append({"name": part.text("name"), "scoring_point": part.text("scoring_point"), "choices": scores})
    if not fields.failed and not any(max(criterion["choices"]) for criterion in rubric):
        fields.wrong("rubric is worth 0 points")
    return rubric
