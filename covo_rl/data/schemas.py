"""Field names of the question sets that are read and written.

| schema   | source                                                                                |
|----------|---------------------------------------------------------------------------------------|
| mmau     | github.com/Sakshi113/MMAU; answers are option texts                                   |
| mmar     | github.com/ddlBoJack/MMAR, MMAR-meta.jsonl; answers are option texts                  |
| mmsu     | hf.co/datasets/ddwang2000/MMSU; options in four fields; answers are texts or letters    |
| avqa     | AVQA in the layout of github.com/xiaomi-research/r1-aqa; a number is an index from 0  |
| audiomcq | hf.co/datasets/inclusionAI/AudioMCQ; answers are option texts or letters              |
| covo     | our own and most others; answers are option texts or letters                          |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

AnswerKind = Literal["text", "letter", "index"]
#: Fields that say in their name how the answer is given; read in schema covo.
EXPLICIT_ANSWERS: Mapping[str, AnswerKind] = {"answer_letter": "letter", "answer_index": "index"}


@dataclass(frozen=True)
class Schema:
    """How one question set names its fields. The first name of each tuple is written, all are read.

    `marks` must be present in a row for the schema to be detected. With `options` the choices are in one field each.
    `answers` says how an answer may be given, in the order in which the readings are tried; only a number can be an
    index. `explicit` are fields that say in their name how the answer is given. `renamed` are columns that a mapping
    reads as fields; they stay readable under their own names.
    """

    name: str
    marks: tuple[str, ...]
    audio: tuple[str, ...]
    id: tuple[str, ...] = ("id",)
    question: tuple[str, ...] = ("question",)
    choices: tuple[str, ...] = ("choices",)
    answer: tuple[str, ...] = ("answer",)
    answers: tuple[AnswerKind, ...] = ("text",)
    options: tuple[str, ...] = ()
    explicit: Mapping[str, AnswerKind] = field(default_factory=dict)
    system_prompt: tuple[str, ...] = ()
    renamed: frozenset[str] = frozenset()

    def with_columns(self, columns: Mapping[str, str]) -> Schema:
        """The schema with the names of a mapping field -> column, and no others for these fields."""
        names: dict[str, Any] = {name: (column,) for name, column in columns.items() if not name.startswith("answer_")}
        if "choices" in names:
            names["options"] = ()
        for name, column in columns.items():
            if name.startswith("answer"):
                kinds = (EXPLICIT_ANSWERS[name],) if name in EXPLICIT_ANSWERS else self.answers
                names |= {"answer": (column,), "answers": kinds, "explicit": {}}
        others = {column for name, column in columns.items() if name != "audio"}
        return replace(self, **names, renamed=frozenset(others - {"id", "audio", "question", "choices", "answer"}))

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """What a row lacks to be read by this schema, as texts. Only rows of schema covo may have no choices."""
        needed = [self.question, self.audio, *((name,) for name in self.options[:2])]
        if self.marks and not self.options:
            needed.append(self.choices)
        return [" or ".join(names) for names in needed if not any(name in row for name in names)]


#: In order of detection: the first schema whose marks a row has.
SCHEMAS: Mapping[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("avqa", ("question_text", "multi_choice"), ("audio_path", "audio", "video_name"),
               question=("question_text",), choices=("multi_choice",), answers=("index", "text")),
        Schema("mmsu", ("question", "choice_a", "choice_b"), ("audio", "audio_path"), choices=(),
               answer=("answer_gt", "answer"), answers=("text", "letter"),
               options=("choice_a", "choice_b", "choice_c", "choice_d")),
        Schema("mmau", ("audio_id", "question", "choices"), ("audio_id", "audio")),
        Schema("audiomcq", ("source_dataset", "audio_path", "question", "choices"), ("audio_path", "audio"),
               answers=("text", "letter")),
        Schema("mmar", ("audio_path", "question", "choices", "modality"), ("audio_path", "audio")),
        Schema("covo", (),
               ("audio", "clips", "audios", "audio_path", "audio_id", "audio_file", "file_name", "path", "wav"),
               ("id", "question_id", "uniq_id"), ("question", "question_text"), ("choices", "options", "multi_choice"),
               ("answer", "answer_text"), ("text", "letter"), explicit=EXPLICIT_ANSWERS,
               system_prompt=("system_prompt",)),
    )
}  # fmt: skip
