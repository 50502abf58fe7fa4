"""What a judge is asked, by name: a set's published wording from the user's file, or our own (eval_sets/judge/*.txt).

Ours is new text, versioned by its file's name, and a number that rests on it is labelled own-judge. Of a user's file
the report keeps the sha256, which says whether it is an edition that the set knows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_rl.resolve import find, folders, meant
from covo_rl.rewards.judging import fill_template

VERSION = "v1"
OWN_LABEL = "own-judge"
#: what is to be graded: a file without a place for it would have the judge grade nothing
GRADED = ("reply", "first", "second", "input_instruction")
_SLOT = re.compile(r"\{\{ ?(\w+) ?\}\}|\{(\w+)\}")


@dataclass(frozen=True)
class JudgePrompt:
    """A wording. `edition` is the set's name for it, None where the set does not know it; `own`: ours."""

    name: str
    text: str
    own: bool
    edition: str | None = None
    path: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """What stands beside a number that rests on it."""
        if self.own:
            return OWN_LABEL
        return f"official edition {self.edition}" if self.edition else "not the official wording"

    def fill(self, **fields: str) -> str:
        """The prompt of a row, no field cut. Of a user's file `{name}` and `{{ name }}` are replaced where the name is
        a field's, and all else stands as it is.

        Raises:
            KeyError: our wording needs a field that is not given.
        """
        if self.own:
            return fill_template(self.text, None, **fields)[0]
        return _SLOT.sub(lambda match: fields.get(match[1] or match[2], match[0]), self.text)

    def record(self) -> dict[str, Any]:
        """For a report."""
        version = {"version": f"{self.name}.{VERSION}"} if self.own else {"file": self.path}
        return {"label": self.label, "sha256": self.sha256, **version}


def prompt_names() -> list[str]:
    """Every name of a wording of ours."""
    files = (path for _, folder in folders("eval_sets") for path in folder.glob(f"judge/*.{VERSION}.txt"))
    return sorted({path.name.removesuffix(f".{VERSION}.txt") for path in files})


def own_prompt(name: str) -> JudgePrompt:
    """Our wording. Raises FileNotFoundError: there is none of this name."""
    path = find("eval_sets", f"judge/{name}.{VERSION}.txt")
    return JudgePrompt(name, path.read_text(encoding="utf-8"), own=True, path=str(path))


def slots_of(text: str) -> set[str]:
    """Names in braces, `{name}` or `{{ name }}`."""
    return {match[1] or match[2] for match in _SLOT.finditer(text)}


def read_judge_prompt(spec: str, known: Mapping[str, str]) -> tuple[str, JudgePrompt] | str:
    """NAME=FILE, NAME also with a language behind it (`vstyle-empathy.zh`) -> (that name, wording), or what is wrong.

    `known`: sha256 of a file -> edition.
    """
    key, equals, file = spec.partition("=")
    name, names = key.partition(".")[0], prompt_names()
    if not equals or not file:
        return f"--judge-prompt {spec}: write NAME=FILE; the names are {', '.join(names)}"
    if name not in names:
        return f"--judge-prompt {spec}: no prompt is named {name!r}; there are {', '.join(names)}"
    path = Path(file)
    if not path.is_file():
        return f"--judge-prompt {spec}: no such file (looked in {Path.cwd()}){meant(path)}"
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return f"--judge-prompt {spec}: not UTF-8 at byte {error.start}"
    ours, theirs = slots_of(own_prompt(name).text), slots_of(text)
    if lost := [slot for slot in GRADED if slot in ours and slot not in theirs]:
        places = ", ".join(f"{{{slot}}}" for slot in sorted(ours - {"begin", "end", "nonce"}))
        return f"--judge-prompt {spec}: it has no place for {{{lost[0]}}}; a row fills {places}"
    prompt = JudgePrompt(name, text, own=False, path=file)
    return key, JudgePrompt(name, text, own=False, edition=known.get(prompt.sha256), path=file)
