"""What an evaluation set is. The sets themselves are the files in eval_sets/, or a manifest (YAML or JSON).

A set says its fields, licence, prompts, breakdown columns, official rule and how to get the data. Data files are the
user's: nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from covo_rl.evaluate.scorers import Scorer, letter_rule, token_set_match
from covo_rl.types import Example

#: set name -> file in eval_sets/ that describes it.
FILES = {"mmau-test-mini": "mmau", "mmau-test": "mmau", "mmar": "mmar", "mmsu": "mmsu", "builtin": "builtin"}
SCORERS: dict[str, Scorer] = {"token_set": token_set_match, "letter": letter_rule}
#: MMAU's names of our nouns.
FIELDS = {"id": "id", "audio": "audio_id", "question": "question", "choices": "choices", "answer": "answer"}
#: Every key under which a reply is accepted in a predictions file; a set's own keys are looked for first.
REPLY_KEYS = ("model_output", "model_prediction", "answer_prediction", "response", "prediction")
MANIFEST_KEYS = (
    "breakdown", "fields", "how_to_get", "known_files", "licence", "name", "prompts", "reply_keys", "rows", "scorer",
    "source", "title",
)  # fmt: skip


class EvalInputError(ValueError):
    """All problems of an evaluation's inputs at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("the evaluation cannot start:\n" + "\n".join(f"  - {p}" for p in self.problems))


@dataclass(frozen=True)
class PromptStyle:
    """The wording of a published evaluation. The template's {question}, {list} (a Python list), {lines} (one option a
    line) and {letters} (`A. text`, one a line) are replaced; everything else stands as it is."""

    template: str
    source: str = ""

    def apply(self, example: Example) -> Example:
        """The row with this wording as its question and no options left to list."""
        parts = {
            "question": example.question,
            "list": str(list(example.choices)),
            "lines": "\n".join(example.choices),
            "letters": "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(example.choices)),
        }
        text = re.sub(r"\{(question|list|lines|letters)\}", lambda match: parts[match[1]], self.template)
        return replace(example, question=text, choices=())


@dataclass(frozen=True)
class EvalSet:
    """One benchmark. `fields` maps our nouns to the names in its files; where it is empty covo_rl.data tells them."""

    name: str
    title: str
    source: str = "user"
    licence: str = "not given"
    how_to_get: str = "yours"
    fields: Mapping[str, str] = field(default_factory=lambda: FIELDS)
    breakdown: tuple[str, ...] = ("task", "category", "sub-category", "difficulty")
    scorer_rule: str = "token_set"
    official_drops: str = "rows without a reply"
    reply_keys: tuple[str, ...] = ()
    prompts: Mapping[str, PromptStyle] = field(default_factory=dict)
    rows: int | None = None
    has_answers: bool = True
    #: sha256 of a data file -> version name; see `version_of`.
    known_files: Mapping[str, str] = field(default_factory=dict)
    identify: Callable[[Sequence[Example]], str | None] = lambda examples: None
    clean: Callable[[str, str], str] = lambda column, value: value
    prepare: Callable[[], tuple[Path, Path]] | None = None
    submission: bool = False
    #: described by a manifest: its field names are the user's
    own: bool = False

    @property
    def scorer(self) -> Scorer:
        return SCORERS[self.scorer_rule]

    @property
    def grader(self) -> Scorer | None:
        """The official scorer; None for a set whose answers only its host has."""
        return self.scorer if self.has_answers else None

    def breakdown_of(self, example: Example) -> dict[str, str]:
        """The values a row is reported under."""
        columns = {name: example.columns.get(name) for name in self.breakdown}
        return {name: self.clean(name, str(value)) for name, value in columns.items() if value not in (None, "")}

    def all_reply_keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.reply_keys, *REPLY_KEYS)))

    def style(self, name: str) -> PromptStyle | None:
        """A published wording of the set, or None for ours (`covo`).

        Raises:
            EvalInputError: it has no such wording.
        """
        if name != "covo" and name not in self.prompts:
            others = ", ".join(self.prompts) or "(no other)"
            raise EvalInputError([f"--prompt {name}: {self.name} has covo, {others}"])
        return self.prompts.get(name)


def load_set(name: str) -> EvalSet:
    """A set by name (see FILES), or from a manifest file.

    Raises:
        EvalInputError: neither; the names are listed.
    """
    if Path(name).suffix in (".yaml", ".yml", ".json") and Path(name).is_file():
        return _from_manifest(Path(name))
    if name not in FILES:
        raise EvalInputError(
            [f"--set {name}: no such set; the sets are {', '.join(FILES)}, or give a manifest file (.yaml, .json)"]
        )
    from covo_rl.resolve import find

    spec = importlib.util.spec_from_file_location(
        f"covo_rl_eval_set_{FILES[name]}", find("eval_sets", f"{FILES[name]}.py")
    )
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SETS[name]


def _from_manifest(path: Path) -> EvalSet:
    """A set of the user's own: EvalSet's fields of these names, all but `name` optional, and `scorer`."""
    import yaml

    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(content, dict):
        raise EvalInputError([f"{path}: expected a mapping, found {type(content).__name__}"])
    problems = [
        f"{path}: unknown key {key!r}; allowed are {', '.join(MANIFEST_KEYS)}"
        for key in content
        if key not in MANIFEST_KEYS
    ]
    rule = content.pop("scorer", "token_set")
    if rule not in SCORERS:
        problems.append(f"{path}: scorer {rule!r}; choose one of {', '.join(SCORERS)}")
    if "name" not in content:
        problems.append(f"{path}: the manifest needs a name")
    if problems:
        raise EvalInputError(problems)
    name = str(content["name"])
    changes = {
        "name": name,
        "fields": content.get("fields") or FIELDS,
        "breakdown": tuple(content.get("breakdown", ("task", "category"))),
        "reply_keys": tuple(content.get("reply_keys", ())),
        "prompts": {key: PromptStyle(**style) for key, style in content.get("prompts", {}).items()},
    }
    return EvalSet(**{"title": name, **content, **changes}, scorer_rule=rule, own=True)


def key_sha256(examples: Sequence[Example]) -> str:
    """Hash of the answer key alone (id, question, choices, answer of every row, in order), whatever the file format."""
    rows = [[e.id, e.question, list(e.choices), e.answer] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def version_of(eval_set: EvalSet, sha256: str, examples: Sequence[Example]) -> str:
    """Which edition of the set this is: by the file's hash where it is known, else by its structure, else unknown."""
    if sha256 in eval_set.known_files:
        return eval_set.known_files[sha256]
    if by_structure := eval_set.identify(examples):
        return f"{by_structure} (told by its structure; this file's hash is not on record)"
    return "unknown (compare data_sha256 before comparing numbers)"
