"""What an evaluation set is, and where its rows come from. The sets themselves are the files in eval_sets/.

A set says its fields, licence, prompts, breakdown columns, official scorer and how to get the data. Data files are
the user's: nothing is downloaded. Any further set is described by a manifest (YAML or JSON) of the same fields.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from covo_rl.evaluate.problems import EvalInputError
from covo_rl.evaluate.scorers import Scorer, letter_rule, token_set_match
from covo_rl.types import Example

#: set name -> file in eval_sets/ that describes it.
FILES = {
    "mmau-test-mini": "mmau",
    "mmau-test": "mmau",
    "mmar": "mmar",
    "mmsu": "mmsu",
    "builtin": "builtin",
}
SCORERS: dict[str, Scorer] = {"token_set": token_set_match, "letter": letter_rule}
#: Every key under which a reply is accepted in a predictions file; a set's own keys are looked for first.
REPLY_KEYS = ("model_output", "model_prediction", "answer_prediction", "response", "prediction")


@dataclass(frozen=True)
class PromptStyle:
    """The wording of a published evaluation. The template's {question}, {list} (a Python list), {lines} (one option a
    line) and {letters} (`A. text`, one a line) are replaced; everything else stands as it is."""

    template: str
    source: str = ""

    def apply(self, example: Example) -> Example:
        """The row with this wording as its question and no options left to list."""
        lettered = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(example.choices)]
        parts = {
            "question": example.question,
            "list": str(list(example.choices)),
            "lines": "\n".join(example.choices),
            "letters": "\n".join(lettered),
        }
        text = re.sub(r"\{(question|list|lines|letters)\}", lambda match: parts[match[1]], self.template)
        return replace(example, question=text, choices=())


@dataclass(frozen=True)
class EvalSet:
    """One benchmark. `fields` maps our nouns to the names in its files."""

    name: str
    title: str
    source: str
    licence: str
    how_to_get: str
    fields: Mapping[str, str]
    breakdown: tuple[str, ...]
    scorer: Scorer
    scorer_rule: str
    official_drops: str
    reply_keys: tuple[str, ...]
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
    def grader(self) -> Scorer | None:
        """The official scorer; None for a set whose answers only its host has."""
        return self.scorer if self.has_answers else None

    def breakdown_of(self, example: Example) -> dict[str, str]:
        """The values a row is reported under."""
        columns = {name: example.columns.get(name) for name in self.breakdown}
        return {name: self.clean(name, str(value)) for name, value in columns.items() if value not in (None, "")}

    def all_reply_keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.reply_keys, *REPLY_KEYS)))


def load_set(name: str) -> EvalSet:
    """A set by name (see FILES), or from a manifest file.

    Raises:
        EvalInputError: neither; the names are listed.
    """
    if name in FILES:
        return _module(FILES[name]).SETS[name]
    path = Path(name)
    if path.is_file() and path.suffix in (".yaml", ".yml", ".json"):
        return from_manifest(path)
    raise EvalInputError(
        [f"--set {name}: no such set; the sets are {', '.join(FILES)}, or give a manifest file (.yaml, .json)"]
    )


def _module(stem: str) -> Any:
    from covo_rl.resolve import find

    path = find("eval_sets", f"{stem}.py")
    spec = importlib.util.spec_from_file_location(f"covo_rl_eval_set_{stem}", path)
    if spec is None or spec.loader is None:
        raise EvalInputError([f"{path}: not a Python file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_manifest(path: Path) -> EvalSet:
    """A set of the user's own. Keys: name, scorer (token_set or letter), and optionally title, source, licence,
    how_to_get, fields, breakdown, reply_keys, prompts {name: {template, source}}, rows, known_files."""
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    allowed = {
        "name", "title", "source", "licence", "how_to_get", "fields", "breakdown", "scorer", "reply_keys", "prompts",
        "rows", "known_files",
    }  # fmt: skip
    if not isinstance(content, dict):
        raise EvalInputError([f"{path}: expected a mapping, found {type(content).__name__}"])
    problems = [
        f"{path}: unknown key {key!r}; allowed are {', '.join(sorted(allowed))}"
        for key in content
        if key not in allowed
    ]
    if content.get("scorer", "token_set") not in SCORERS:
        problems.append(f"{path}: scorer {content['scorer']!r}; choose one of {', '.join(SCORERS)}")
    if "name" not in content:
        problems.append(f"{path}: the manifest needs a name")
    if problems:
        raise EvalInputError(problems)
    rule = content.get("scorer", "token_set")
    return EvalSet(
        name=str(content["name"]), title=content.get("title", str(content["name"])),
        source=content.get("source", "user"),
        licence=content.get("licence", "not given"), how_to_get=content.get("how_to_get", "yours"),
        fields=content.get("fields") or {"id": "id"}, breakdown=tuple(content.get("breakdown", ("task", "category"))),
        scorer=SCORERS[rule], scorer_rule=rule, official_drops="rows without a reply",
        reply_keys=tuple(content.get("reply_keys", ())), rows=content.get("rows"),
        prompts={key: PromptStyle(**style) for key, style in content.get("prompts", {}).items()},
        known_files=content.get("known_files", {}), own=True,
    )  # fmt: skip


def key_sha256(examples: Sequence[Example]) -> str:
    """Hash of the answer key alone (id, question, choices, answer of every row, in order), whatever the file format."""
    rows = [[e.id, e.question, list(e.choices), e.answer] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def version_of(eval_set: EvalSet, sha256: str, examples: Sequence[Example]) -> str:
    """Which edition of the set this is: by the file's hash where it is known, else by its structure, else unknown."""
    if sha256 in eval_set.known_files:
        return eval_set.known_files[sha256]
    by_structure = eval_set.identify(examples)
    if by_structure:
        return f"{by_structure} (told by its structure; this file's hash is not on record)"
    return "unknown (compare data_sha256 before comparing numbers)"


def option_counts(examples: Sequence[Example]) -> dict[int, int]:
    """number of options -> rows."""
    return dict(Counter(len(e.choices) for e in examples))
