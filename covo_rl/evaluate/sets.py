"""What an evaluation set is, and the rules that score it. The sets are the files in eval_sets/, or a manifest.

A set says its fields, licence, prompts, breakdown columns, official rule and how to get the data. Data files are the
user's: nothing is downloaded.

A scorer says True (right), False (wrong) or None (the official script drops the row from its denominator). None of
them guesses: there is no random choice when nothing can be read.

    token_set_match    MMAU and MMAR: the answer's words are there, words of other options are not
    letter_rule        MMSU and AIR-Bench: first character, else second-last
    strict_match       the accuracy reward's matcher, on the extracted answer or on the whole reply
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from covo_rl.config import ConfigError, typed_values
from covo_rl.prompt import Parsed
from covo_rl.resolve import read_yaml
from covo_rl.types import Example, UserError, visible

if TYPE_CHECKING:
    from covo_rl.evaluate.speech.sets import SpeechSet

#: (reply, choices, answer) -> right, wrong, or not scored by the official script.
Scorer = Callable[[object, Sequence[str], str], bool | None]


def reply_words(text: str) -> frozenset[str]:
    """Lower-cased maximal runs of Unicode word characters (letters, digits, underscore), as a set."""
    return frozenset(re.findall(r"\w+", text.lower()))


def token_set_match(reply: object, choices: Sequence[str], answer: str) -> bool | None:
    """The rule of MMAU's and MMAR's evaluation scripts (Sakshi113/MMAU @110127f, ddlBoJack/MMAR @3bce090).

    Right when every word of the answer is in the reply and no word that only other options have is. Word order,
    negation and letters play no part, so "not a dog" is right for "dog" and "A" is wrong. A missing reply (None or
    not a string) is None: the scripts skip such rows.

    >>> token_set_match("(A) dog", ["dog", "cat"], "dog"), token_set_match("dog and cat", ["dog", "cat"], "dog")
    (True, False)
    """
    if not isinstance(reply, str):
        return None
    said, wanted = reply_words(reply), reply_words(answer)
    if not said:
        return False
    forbidden = frozenset().union(*(reply_words(choice) - wanted for choice in choices))
    return wanted <= said and not (said & forbidden)


def letter_rule(reply: object, choices: Sequence[str], answer: str) -> bool | None:
    """The rule of MMSU's evaluation script (dingdongwang/MMSU @217d1d3, 2026-02-12).

    It reads the first character, else the second-last. An empty reply or the word None is wrong; a reply with neither
    of A-D there, and one that is not a string, is None: numerator and denominator both lose the row. Otherwise the
    option under the letter must equal the answer text, so with duplicate options both letters are right.

    >>> letter_rule("Dog", ["ant", "bee", "cow", "dog"], "dog"), letter_rule("(A).", ["ant", "bee"], "ant")
    (True, None)
    """
    if not isinstance(reply, str):
        return None
    text = reply.strip().replace("\n", "")
    if not text or text == "None":
        return False
    index = leading_letter(text)
    return None if index is None else index < len(choices) and choices[index] == answer


def leading_letter(text: str) -> int | None:
    """0 to 3 for A to D as the first character, else as the second-last; None for neither."""
    return next(("ABCD".index(letter) for letter in (text[:1], text[-2:-1]) if letter and letter in "ABCD"), None)


def strict_match(text: str | None, choices: Sequence[str], answer: str, question: str = "") -> bool:
    """The accuracy reward's verdict on an answer text; None (nothing extracted) and empty text are wrong.

    Uses the reward itself (`rewards/accuracy.py`), so evaluation and training cannot disagree. What the reward
    cannot grade (an answer key that is not among the options) is wrong here.
    """
    if text is None or not text.strip():
        return False
    row = {"completions": text, "answer": answer, "choices": list(choices), "question": question,
           "parsed": Parsed(think=None, answer=text.strip())}  # fmt: skip
    score = _accuracy()(**{name: [value] for name, value in row.items()})[0]
    return score is not None and score >= 1.0


@cache
def _accuracy() -> Callable[..., list[float | None]]:
    from covo_rl import rewards

    return rewards.load_reward("accuracy")


# -- sets ------------------------------------------------------------------------------------------------------------

#: set name -> file in eval_sets/ that describes it.
FILES = {"mmau-test-mini": "mmau", "mmau-test": "mmau", "mmar": "mmar", "mmsu": "mmsu", "builtin": "builtin",
         "own": "own", "duplex": "duplex", "mmar-rubrics": "mmar", "uro-bench": "uro_bench", "vstyle": "vstyle",
         "full-duplex-bench": "full_duplex_bench", "mtr-duplexbench": "mtr_duplexbench", "vcb-bench": "vcb_bench",
         "air-bench": "air_bench", "voicebench": "voicebench", "asr": "asr", "seed-tts": "seed_tts",
         "spoken-lm": "spoken_lm", "covost2": "covost2", "mmau-pro": "mmau_pro"}  # fmt: skip
SCORERS: dict[str, Scorer] = {"token_set": token_set_match, "letter": letter_rule}
#: MMAU's names of our nouns.
FIELDS = {"id": "id", "audio": "audio_id", "question": "question", "choices": "choices", "answer": "answer"}
#: Every key under which a reply is accepted in a predictions file; a set's own keys are looked for first.
REPLY_KEYS = ("model_output", "model_prediction", "answer_prediction", "response", "prediction")
#: key of a manifest -> what it holds
MANIFEST_KEYS: dict[str, Any] = {
    "breakdown": list[str], "fields": dict[str, str] | None, "how_to_get": str, "known_files": dict[str, str],
    "licence": str, "name": str, "prompts": dict[str, Any], "reply_keys": list[str], "rows": int | None, "scorer": str,
    "source": str, "title": str,
}  # fmt: skip


class EvalInputError(UserError, ValueError):
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
class SetFacts:
    """What every set says of itself, whether a letter answers it (EvalSet) or speech (speech/sets.py)."""

    name: str
    title: str
    source: str = "user"
    licence: str = "not given"
    how_to_get: str = "yours"
    #: figure -> model -> published score; a figure of a set of letters is `overall`, or COLUMN: VALUE of its breakdown
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    #: model -> where its published scores stand
    published_in: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalSet(SetFacts):
    """One benchmark. `fields` maps our nouns to the names in its files; where it is empty covo_rl.data tells them."""

    fields: Mapping[str, str] = field(default_factory=lambda: FIELDS)
    breakdown: tuple[str, ...] = ("task", "category", "sub-category", "difficulty")
    scorer_rule: str = "token_set"
    official_drops: str = "rows without a reply"
    reply_keys: tuple[str, ...] = ()
    prompts: Mapping[str, PromptStyle] = field(default_factory=dict)
    rows: int | None = None
    has_answers: bool = True
    #: how the names of those editions begin that published scores are of, where there are several
    published_edition: str = ""
    #: sha256 of a data file -> version name; see `version_of`.
    known_files: Mapping[str, str] = field(default_factory=dict)
    identify: Callable[[Sequence[Example]], str | None] = lambda examples: None
    clean: Callable[[str, str], str] = lambda column, value: value
    prepare: Callable[[], tuple[Path, Path]] | None = None
    submission: bool = False
    #: rows are streams of two channels, which ask a live session when it speaks (duplex_streams.py)
    streams: bool = False
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
        texts = {name: str(value) for name, value in columns.items() if value not in (None, "")}
        return {name: visible(self.clean(name, text)) for name, text in texts.items()}

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


def load_set(name: str) -> EvalSet | SpeechSet:
    """A set by name (see FILES), or from a manifest file.

    Raises:
        EvalInputError: neither; the names are listed.
    """
    if Path(name).suffix in (".yaml", ".yml", ".json") and Path(name).is_file():
        return _from_manifest(Path(name))
    if name not in FILES:
        names = f"{', '.join(FILES)}, or give a manifest file (.yaml, .json)"
        near = [known for known in FILES if name and known.startswith(name)]
        near = near or difflib.get_close_matches(name, FILES, n=1)
        guess = f"; did you mean {near[0]}?" if near else ";"
        raise EvalInputError([f"--set {name}: no such set{guess} the sets are {names}"])
    from covo_rl.resolve import find

    return runpy.run_path(str(find("eval_sets", f"{FILES[name]}.py")))["SETS"][name]


def letter_set(name: str) -> EvalSet:
    """A set whose replies are choices and a letter.

    Raises:
        EvalInputError: there is no such set, or its replies are speech.
    """
    if not isinstance(found := load_set(name), EvalSet):
        raise EvalInputError([f"--set {name}: {found.title} is a set of speech, which has no letters to score"])
    return found


def _from_manifest(path: Path) -> EvalSet:
    """A set of the user's own: EvalSet's fields of these names, all but `name` optional, and `scorer`."""
    try:
        raw = read_yaml(path)
    except ConfigError as error:
        raise EvalInputError(error.problems) from None
    allowed = ", ".join(MANIFEST_KEYS)
    problems = [f"{path}: unknown key {key!r}; allowed are {allowed}" for key in raw if key not in MANIFEST_KEYS]
    known = {name: value for name, value in raw.items() if name in MANIFEST_KEYS}
    content: dict[str, Any] = typed_values(MANIFEST_KEYS, known, problems, str(path))
    styles = {}
    for key, style in content.get("prompts", {}).items():
        wording = style if isinstance(style, Mapping) else {"template": style}
        values = typed_values(get_type_hints(PromptStyle), wording, problems, f"{path}: prompts: {key}")
        if "template" in values:
            styles[key] = PromptStyle(**values)
        elif "template" not in wording:
            problems.append(f"{path}: prompts: {key} has no template")
    rule = content.pop("scorer", "token_set")
    if rule not in SCORERS:
        problems.append(f"{path}: scorer {rule!r}; choose one of {', '.join(SCORERS)}")
    if "name" not in raw:
        problems.append(f"{path}: the manifest needs a name")
    if problems:
        raise EvalInputError(problems)
    name = content.pop("name")
    changes = {
        "fields": content.get("fields") or FIELDS,
        "breakdown": tuple(content.get("breakdown", ("task", "category"))),
        "reply_keys": tuple(content.get("reply_keys", ())),
        "prompts": styles,
    }
    return EvalSet(name, **{"title": name, **content, **changes}, scorer_rule=rule, own=True)


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
