"""Reasoning -> clauses with what they name, assert, deny and hedge. English, deterministic, linear in the length."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from covo_rl.rewards.rules.normalize import MAX_CHARS, clean_text, text_tokens
from covo_rl.rewards.rules.vocabulary import word_set

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
_PRONOUN_AFTER = word_set("of can could may might must should would hears")
_PRONOUN_BEFORE = word_set("no at any every some each which that this")

NEGATORS = word_set(
    "not no never neither nor without isn't wasn't aren't weren't doesn't don't didn't can't cannot couldn't won't "
    "wouldn't hasn't haven't unlike except excluding exclude reject rejected eliminate eliminated rules ruled rule "
    "instead"
)
_REJECTED = word_set("wrong incorrect unlikely false impossible excluded eliminated ruled")
_NEGATIVE_COPULA = word_set("isn't wasn't aren't weren't doesn't didn't can't cannot couldn't")
_AFTER_NOT = word_set(
    "correct right present heard answer it possible likely there audible case playing played match fit matches fits "
    "the one"
)
HEDGES = word_set(
    "might may maybe perhaps could possibly either whether if unsure uncertain would alternatively suppose"
)
CUES = word_set(
    "therefore thus hence conclude concludes conclusion answer must clearly finally correct choose pick select "
    "definitely wait actually overall"
)
_SCOPE = 8  # tokens that a negation reaches forward


@dataclass(frozen=True, slots=True)
class Clause:
    """`strong`: it concludes ("so", "the answer is"); `hedged`: it only considers ("might be"), or asks."""

    tokens: tuple[str, ...]
    strong: bool
    hedged: bool


@dataclass(frozen=True, slots=True)
class Mention:
    """`name` is named at tokens[start:end]; `denied` if the clause says it is not so."""

    name: str
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
        if "(" in piece:
            piece = _LETTER.sub(r" option \1 ", piece)
        if "no" in piece or "oubt" in piece:
            piece = _NOT_NEGATIVE.sub(" ", piece)
        tokens = tuple(text_tokens(piece))
        if tokens:
            strong = tokens[0] in ("so", "then") or not CUES.isdisjoint(tokens)
            result.append(Clause(tokens, strong, asks or not HEDGES.isdisjoint(tokens)))
    return tuple(result)


Index = dict[str, tuple[tuple[tuple[str, ...], str], ...]]


def make_index(phrases: Iterable[tuple[tuple[str, ...], str]]) -> Index:
    """(tokens, name) pairs -> lookup by first token, the longest phrase first."""
    index: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for tokens, name in phrases:
        if tokens:
            index.setdefault(tokens[0], []).append((tokens, name))
    return {first: tuple(sorted(found, key=lambda item: -len(item[0]))) for first, found in index.items()}


def mentions(clause: Clause, index: Index) -> list[Mention]:
    """What of the index is named in a clause, from left to right, the longest phrase winning."""
    tokens = clause.tokens
    if index.keys().isdisjoint(tokens):
        return []
    found: list[tuple[str, int, int]] = []
    free = 0  # where the last phrase ended
    for i, token in enumerate(tokens):
        if i < free or token not in index:
            continue
        for phrase, name in index[token]:
            end = i + len(phrase)
            if tokens[i:end] == phrase and not (phrase == ("1",) and _is_pronoun(tokens, i)):
                found.append((name, i, end))
                free = end
                break
    if not found:
        return []
    inside = {at for _, a, b in found for at in range(a, b)}
    starts = [a for _, a, _ in found[1:]] + [len(tokens)]
    return [
        Mention(name, a, b, _denied(tokens, a, b, stop, inside))
        for (name, a, b), stop in zip(found, starts, strict=True)
    ]


def _is_pronoun(tokens: tuple[str, ...], i: int) -> bool:
    after = tokens[i + 1] if i + 1 < len(tokens) else ""
    before = tokens[i - 1] if i else ""
    return after in _PRONOUN_AFTER or before in _PRONOUN_BEFORE


def _denied(tokens: tuple[str, ...], start: int, end: int, stop: int, inside: set[int]) -> bool:
    """Is the phrase at tokens[start:end] denied, by a negation before it or a rejection between it and `stop`?"""
    for at in range(max(0, start - _SCOPE), start):
        if at in inside:
            continue
        if tokens[at] in NEGATORS or (tokens[at] == "than" and at and tokens[at - 1] in ("rather", "other")):
            return True
    after = tokens[end : min(stop, end + 4)]
    for at, token in enumerate(after):
        following = after[at + 1] if at + 1 < len(after) else ""
        if token in _REJECTED:
            return True
        if (token == "not" or token in _NEGATIVE_COPULA) and (not following or following in _AFTER_NOT):
            return True
    return False


def word_tokens(text: str) -> tuple[str, ...]:
    """A phrase as clauses would show it."""
    return tuple(text_tokens(clean_text(text)))
