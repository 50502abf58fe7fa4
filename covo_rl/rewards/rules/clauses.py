"""Reasoning -> clauses with what they name, assert, deny and hedge. English, deterministic, linear in the length."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from covo_rl.rewards.rules.normalize import MAX_CHARS, text_tokens

_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n+")
_CLAUSE = re.compile(
    r",?\s+(?=(?:but|however|although|though|yet|whereas|while|because|since|so|therefore|thus|hence|wait|actually)\b)"
    r"|,\s+(?=(?:it|it's|this|that|these|those|i|we|they|there|the answer|rather|not|which|and not)\b)"
    r"|\s+(?:-|--)\s+",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\(([A-Z])\)")
_NOT_NEGATIVE = re.compile(r"\b(?:no|without(?: a)?|beyond) doubt\b|\bnot (?:only|just)\b|\bno wonder\b", re.IGNORECASE)
#: "one" that counts nothing: the word before or after it gives it away.
_PRONOUN_BEFORE = frozenset("no at any every some each which that this".split())
_PRONOUN_AFTER = frozenset("of can could may might must should would hears".split())
_NEGATORS = frozenset(
    "not no never neither nor without isn't wasn't aren't weren't doesn't don't didn't can't cannot couldn't won't "
    "wouldn't hasn't haven't unlike except excluding exclude reject rejected eliminate eliminated rules ruled rule "
    "instead".split()
)
_INSTEAD_OF = (("rather", "than"), ("other", "than"))
_SCOPE = 8  # tokens that a negation reaches forward
_REJECTED = frozenset("wrong incorrect unlikely false impossible excluded eliminated ruled".split())
_NOT = frozenset("not isn't wasn't aren't weren't doesn't didn't can't cannot couldn't".split())
#: what "not" behind a phrase must be followed by to deny it; "" is the end
_AFTER_NOT = frozenset(
    "correct right present heard answer it possible likely there audible case playing played match fit matches fits "
    "the one".split()
) | {""}
_HEDGES = frozenset(
    "might may maybe perhaps could possibly either whether if unsure uncertain would alternatively suppose".split()
)
_CUES = frozenset(
    "therefore thus hence conclude concludes conclusion answer must clearly finally correct choose pick select "
    "definitely wait actually overall".split()
)

#: first token -> (tokens, name) of the phrases that start with it, the longest first
Index = dict[str, list[tuple[tuple[str, ...], Any]]]


@dataclass(frozen=True, slots=True)
class Clause:
    """`strong`: it concludes ("so", "the answer is"); `hedged`: it only considers ("might be"), or asks."""

    tokens: tuple[str, ...]
    strong: bool
    hedged: bool


@dataclass(frozen=True, slots=True)
class Mention:
    """`name` is named at tokens[start:end]; `denied` if the clause says it is not so."""

    name: Any
    start: int
    end: int
    denied: bool


@lru_cache(maxsize=16384)
def clauses(text: str) -> tuple[Clause, ...]:
    """The clauses of a text, in order."""
    return tuple(clause for sentence in _SENTENCE.split(text[:MAX_CHARS]) for clause in _in_sentence(sentence))


@lru_cache(maxsize=16384)
def _in_sentence(sentence: str) -> tuple[Clause, ...]:
    """Rollouts of one prompt share many sentences, so these are remembered one by one."""
    result = []
    asks = sentence.rstrip().endswith("?")
    for piece in _CLAUSE.split(sentence):
        text = _LETTER.sub(r" option \1 ", piece)
        if "no" in text or "oubt" in text:
            text = _NOT_NEGATIVE.sub(" ", text)
        if tokens := tuple(text_tokens(text)):
            strong = tokens[0] in ("so", "then") or not _CUES.isdisjoint(tokens)
            result.append(Clause(tokens, strong, asks or not _HEDGES.isdisjoint(tokens)))
    return tuple(result)


def make_index(phrases: Iterable[tuple[tuple[str, ...], Any]]) -> Index:
    """(tokens, name) pairs -> lookup by first token; of equal phrases the first counts."""
    index: Index = {}
    for tokens, name in sorted(phrases, key=lambda phrase: -len(phrase[0])):
        if tokens:
            index.setdefault(tokens[0], []).append((tokens, name))
    return index


def mentions(clause: Clause, index: Index) -> list[Mention]:
    """What of the index is named in a clause, from left to right, the longest phrase winning."""
    tokens, spans, free = clause.tokens, [], 0
    if index.keys().isdisjoint(tokens):
        return []
    for start, token in enumerate(tokens):
        if start < free or token not in index:
            continue
        for phrase, name in index[token]:
            end = start + len(phrase)
            if tokens[start:end] == phrase and not (phrase == ("1",) and _is_pronoun(tokens, start)):
                spans.append((name, start, end))
                free = end
                break
    inside = {at for _, start, end in spans for at in range(start, end)}
    stops = [*(start for _, start, _ in spans), len(tokens)][1:]
    return [
        Mention(name, start, end, _is_denied(tokens, start, end, stop, inside))
        for (name, start, end), stop in zip(spans, stops, strict=True)
    ]


def _is_pronoun(tokens: tuple[str, ...], at: int) -> bool:
    before, after = tokens[max(at - 1, 0) : at], tokens[at + 1 : at + 2]
    return not (_PRONOUN_BEFORE.isdisjoint(before) and _PRONOUN_AFTER.isdisjoint(after))


def _is_denied(tokens: tuple[str, ...], start: int, end: int, stop: int, inside: set[int]) -> bool:
    """By a negation before tokens[start:end] that is no part of a name, or a rejection between them and `stop`."""
    for at in range(max(0, start - _SCOPE), start):
        if at not in inside and (tokens[at] in _NEGATORS or tokens[max(at - 1, 0) : at + 1] in _INSTEAD_OF):
            return True
    after = (*tokens[end : min(stop, end + 4)], "")
    return any(word in _REJECTED or (word in _NOT and following in _AFTER_NOT) for word, following in pairwise(after))
