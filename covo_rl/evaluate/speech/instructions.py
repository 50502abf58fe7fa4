r"""MMAU-Pro's instruction following (arXiv 2508.13992): does a reply keep to the form that was asked for?

    follows("number words (at most)", reply, {"N": 50})
    follows("include keywords", reply, {"keywords": ["rain", "wind"]})

From the written rule: the benchmark's script has no licence, so its verdicts are not compared. An empty reply follows
nothing. A count is compared as the name or the argument `relation` says: `at least`, `at most`, `exactly` N, or a
`range` from N1 to N2; without a word, as in the table RULES.

word: what stands between spaces; sentence: ends in . ! ? or their Chinese forms; paragraph: between empty lines;
bullet: a line that begins `* `; highlight: `*text*` or `**text**`; placeholder: `[text]`; title: `<<text>>`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covo_rl.evaluate.speech.fields import MalformedRow, checked, field
from covo_rl.types import shown, visible

Arguments = Mapping[str, Any]
RELATIONS = ("at least", "at most", "exactly", "range")
_NAME = re.compile(rf"(.*?)\s*(?:\(?({'|'.join(RELATIONS)})\)?)?")
_HIGHLIGHT = re.compile(r"(?<!\*)(\*{1,2})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?!\*)")


@dataclass(frozen=True)
class Instruction:
    """`found` counts in (reply, arguments), to compare as `relation` unless told otherwise; or says yes or no."""

    found: Callable[[str, Arguments], int | bool]
    relation: str | None = None


def follows(instruction: str, reply: str, arguments: Arguments) -> bool:
    """The verdict on one reply.

    >>> follows("Number Words (at most)", "one two three", {"N": 3}), follows("no commas", "yes, sir", {})
    (True, False)

    Raises:
        MalformedRow: no such instruction, or an argument that is not there or does not fit.
    """
    match = _NAME.fullmatch(" ".join(instruction.lower().replace("_", " ").split()))
    name, relation = match.groups() if match else ("", None)
    if name not in RULES:
        raise MalformedRow(f"instruction {visible(shown(instruction))}; there are {', '.join(RULES)}")
    rule = RULES[name]
    if not reply.strip():
        return False
    found = rule.found(reply, arguments)
    if rule.relation is None:
        return bool(found)
    return _compared(found, relation or arguments.get("relation") or rule.relation, arguments)


def _compared(count: int, relation: object, arguments: Arguments) -> bool:
    if relation not in RELATIONS:
        raise MalformedRow(f"relation {visible(shown(relation))}; there are {', '.join(RELATIONS)}")
    if relation == "range":
        return _whole(arguments, "N1") <= count <= _whole(arguments, "N2")
    n = _whole(arguments, "N")
    return {"at least": count >= n, "at most": count <= n, "exactly": count == n}[str(relation)]


def _whole(arguments: Arguments, name: str) -> int:
    value = field(arguments, name, float)
    if value != int(value) or value < 0:
        raise MalformedRow(f"{name!r} is {value}; it must be a whole number from 0 on")
    return int(value)


def _text(arguments: Arguments, name: str) -> str:
    text = field(arguments, name, str).strip()
    if not text:
        raise MalformedRow(f"{name!r} is empty")
    return text


def _texts(arguments: Arguments, name: str) -> list[str]:
    """A list of texts, or texts with commas between them."""
    value = arguments.get(name)
    given = value.split(",") if isinstance(value, str) else field(arguments, name, Sequence)
    texts = [checked(text, f"an entry of {name!r}", str).strip() for text in given]
    if not all(texts) or not texts:
        raise MalformedRow(f"{name!r} is {visible(shown(value))}; it must be words")
    return texts


def occurrences(phrase: str, text: str) -> int:
    """How often a phrase stands in a text as words of its own, case aside; in scripts without spaces anywhere.

    >>> occurrences("rain", "Rain, rain! It rained."), occurrences("雨", "下雨了")
    (2, 1)
    """
    start, end = (r"(?<!\w)" if phrase[0].isascii() else ""), (r"(?!\w)" if phrase[-1].isascii() else "")
    return len(re.findall(start + re.escape(phrase) + end, text, re.IGNORECASE))


def _sentences(reply: str) -> int:
    return sum(
        any(c.isalnum() for c in part) for part in re.split(r"(?<=[.!?])[\"')\]]*\s+|(?<=[\u3002\uff01\uff1f])", reply)
    )


def _sections(reply: str, arguments: Arguments) -> int:
    splitter = re.escape(_text(arguments, "section_splitter"))
    return len(re.findall(rf"^\W*{splitter}\s*\d+", reply, re.IGNORECASE | re.MULTILINE))


def _postscript(reply: str, arguments: Arguments) -> bool:
    marker = r"\s*".join(re.escape(c) for c in _text(arguments, "marker") if not c.isspace())
    return bool(re.search(rf"^\s*{marker}", reply, re.IGNORECASE | re.MULTILINE))


def _begins(reply: str, arguments: Arguments) -> bool:
    return reply.strip(" \t\n\r\"'\u201c\u201d").casefold().startswith(_text(arguments, "phrase").casefold())


def _ends(reply: str, arguments: Arguments) -> bool:
    return reply.strip(" \t\n\r\"'\u201c\u201d").casefold().endswith(_text(arguments, "phrase").casefold())


def _quoted(reply: str, arguments: Arguments) -> bool:
    text = reply.strip()
    return len(text) > 1 and text[0] in '"\u201c' and text[-1] in '"\u201d'


def _in_case(reply: str, changed: str) -> bool:
    return reply == changed and any(c.isalpha() for c in reply)


RULES: dict[str, Instruction] = {
    "number words": Instruction(lambda reply, _: len(reply.split()), "at least"),
    "number sentences": Instruction(lambda reply, _: _sentences(reply), "at least"),
    "number paragraphs": Instruction(
        lambda reply, _: sum(map(bool, map(str.strip, re.split(r"\n\s*\n", reply)))), "exactly"
    ),
    "number bullets": Instruction(lambda reply, _: len(re.findall(r"^[ \t]*\* +\S", reply, re.MULTILINE)), "exactly"),
    "number highlights": Instruction(lambda reply, _: len(_HIGHLIGHT.findall(reply)), "at least"),
    "number placeholders": Instruction(
        lambda reply, _: len(re.findall(r"\[[ \t]*[^\s\[\]][^\[\]\n]*\]", reply)), "at least"
    ),
    "number sections": Instruction(_sections, "at least"),
    "all capitals": Instruction(lambda reply, _: _in_case(reply, reply.upper())),
    "all lowercase": Instruction(lambda reply, _: _in_case(reply, reply.lower())),
    "number capital words": Instruction(lambda reply, _: sum(map(str.isupper, reply.split())), "at least"),
    "include keywords": Instruction(
        lambda reply, args: all(occurrences(word, reply) for word in _texts(args, "keywords"))
    ),
    "forbidden words": Instruction(
        lambda reply, args: not any(occurrences(word, reply) for word in _texts(args, "keywords"))
    ),
    "keyword frequency": Instruction(lambda reply, args: occurrences(_text(args, "keyword"), reply), "exactly"),
    "title": Instruction(lambda reply, _: bool(re.search(r"<<[ \t]*[^\s<>][^<>\n]*>>", reply))),
    "postscript": Instruction(_postscript),
    "first phrase": Instruction(_begins),
    "last phrase": Instruction(_ends),
    "quotation": Instruction(_quoted),
    "no commas": Instruction(lambda reply, _: not re.search("[,\uff0c\u3001]", reply)),
}
