"""Text that a user, a data row or a model wrote, on its way to ids: special tokens that it spells stay text.

`shielded` cuts every such token after its first character; `token_ids` gives the pieces to the tokenizer one by one,
so that it never sees the token and the ids decode to what was written. Text without special tokens is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from covo_rl.prompt import CONTROL, CUT
from covo_rl.types import TAG_TOKENS, visible

#: what no text that becomes ids may hold
_UNFIT = re.compile(rf"[{CUT}\ud800-\udfff]")


@dataclass(frozen=True)
class _Special:
    """The special tokens of a tokenizer: the longest first, one pattern that matches any, their ids."""

    names: tuple[str, ...]
    pattern: re.Pattern[str]
    ids: frozenset[int]


@lru_cache(maxsize=8)  # of a published tokenizer there can be thousands
def _special(tokenizer: Any, size: int) -> _Special:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    # of some tokenizers (Qwen, DeepSeek) not all control tokens are called special
    names = {str(token) for token in added if token.special or CONTROL.fullmatch(str(token))}
    names = (names | set(map(str, tokenizer.all_special_tokens))) - {*TAG_TOKENS, ""}
    ordered = tuple(sorted(names, key=lambda name: (-len(name), name)))
    pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
    ids = frozenset(tokenizer.convert_tokens_to_ids(list(ordered))) - {tokenizer.unk_token_id}
    return _Special(ordered, pattern, ids)


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """What opens and ends turns, marks audio, pads; the longest first. Never the four tags: completions have them."""
    return _special(tokenizer, len(tokenizer)).names


def unfit(text: str) -> str:
    """What a text holds that keeps it from becoming ids; empty if nothing."""
    if not (match := _UNFIT.search(text)):
        return ""
    kind, why = ("noncharacter", "marks cuts here") if match[0] == CUT else ("lone surrogate", "is no character")
    return f"holds the {kind} U+{ord(match[0]):04X}, which {why}"


def shielded(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """The texts with CUT inside every special token that they spell, alone or from the end of one into the next.

    Raises:
        ValueError: a text holds CUT itself, or a lone surrogate, which no tokenizer takes.
    """
    joined = "".join(texts)
    if why := unfit(joined):
        raise ValueError(f"a text {why}; remove it")
    pattern, cuts, place = _special(tokenizer, len(tokenizer)).pattern, [], 0
    while match := pattern.search(joined, place):  # tokens may overlap: each is cut after its first character
        place = match.start() + 1
        cuts.append(place)
    start, result = 0, []
    for text in texts:
        places = [0, *(cut - start for cut in cuts if start < cut <= start + len(text)), len(text)]
        result.append(CUT.join(text[a:b] for a, b in pairwise(places)))
        start += len(text)
    return result


def shielded_messages(messages: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """A copy of a conversation whose texts are `shielded`; a content is one text, or parts of which some are text."""
    rows = [dict(message) for message in messages]
    holders: list[tuple[dict[str, Any], str]] = []
    for row in rows:
        if isinstance(row["content"], str):
            holders.append((row, "content"))
        elif row["content"]:
            row["content"] = [dict(part) for part in row["content"]]
            holders += [(part, "text") for part in row["content"] if isinstance(part.get("text"), str)]
    texts = shielded([holder[name] for holder, name in holders], tokenizer)
    for (holder, name), text in zip(holders, texts, strict=True):
        holder[name] = text
    return rows


def token_ids(tokenizer: Any, pieces: Iterable[str]) -> list[int]:
    """Pieces of one text, as `CUT` parts them -> ids; special tokens only where a piece spells one.

    Raises:
        ValueError: this tokenizer makes special tokens of other text too (it normalises, or one is a single character).
    """
    pieces = list(pieces)
    ids = [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    special = _special(tokenizer, len(tokenizer))
    written = sum(len(special.pattern.findall(piece)) for piece in pieces)
    if (count := sum(i in special.ids for i in ids)) > written:
        raise ValueError(f"its text becomes {count - written} special tokens of this tokenizer; change the wording")
    return ids


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that somebody wrote: none of them is a special token."""
    return token_ids(tokenizer, shielded([text], tokenizer)[0].split(CUT))


def padded_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """`tokenizer(texts, **options)`, where texts may hold CUT."""
    if not any(CUT in text for text in texts):
        return tokenizer(list(texts), **options)
    return tokenizer.pad({"input_ids": [token_ids(tokenizer, text.split(CUT)) for text in texts]}, **options)


def special_token_notes(texts: Iterable[tuple[str, str]], tokenizer: Any) -> list[str]:
    """One line for a run, or none: which of these (row id, text) spell special tokens of the model."""
    names: dict[str, None] = {}
    rows: dict[str, None] = {}
    pattern = _special(tokenizer, len(tokenizer)).pattern
    for row, text in texts:
        if written := pattern.findall(text):
            names.update(dict.fromkeys(written))
            rows[row] = None
    if not rows:
        return []
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    count = f"{len(rows)} row{'s' * (len(rows) != 1)}"
    which = f"{', '.join(map(visible, list(rows)[:5]))}{more}"
    return [f"note: {count} ({which}) spell special tokens of the model ({', '.join(list(names)[:5])}); they stay text"]
