"""Reasoning -> clauses with what they name, assert, deny and hedge -> the option it commits to, or nothing.

English and Chinese, told apart sentence by sentence; deterministic, linear in the length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from covo_rl.prompt import option_letter
from covo_rl.rewards.rules.answers import interpret
from covo_rl.rewards.rules.chinese import (
    JOINED,
    asks,
    chinese_tokens,
    is_chinese,
    measureless,
    pieces,
    says_nothing_alone,
)  # fmt: skip
from covo_rl.rewards.rules.frames import bare
from covo_rl.rewards.rules.normalize import loose_key, text_tokens
from covo_rl.rewards.rules.options import prepare
from covo_rl.rewards.rules.text import MAX_CHARS

_SENTENCE = re.compile("(?<=[.!?;:])\\s+|\n+|(?<=[\u3002\uff01\uff1f\uff1b])")
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
_CHINESE_SCOPE = 24  # where each character is one
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
#: place in a sequence -> words of a question that ask for it
_PLACES = {
    0: frozenset("1st start starts started begin begins beginning initial initially opens earliest".split()),
    -1: frozenset("last end ends ended final finally closes latest".split()),
}
_THEN = frozenset("then before followed precedes preceding next after".split())

#: first token -> (tokens, name) of the phrases that start with it, the longest first
Index = dict[str, list[tuple[tuple[str, ...], Any]]]


@dataclass(frozen=True, slots=True)
class Clause:
    """`strong`: it concludes ("so", "the answer is"); `hedged`: it only considers ("might be"), or asks.

    `scope`: tokens that a negation in it reaches forward; half as many backward.
    """

    tokens: tuple[str, ...]
    strong: bool
    hedged: bool
    scope: int = _SCOPE


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
    lines = "\n".join(
        " ".join(line.split()) for line in text[:MAX_CHARS].splitlines()
    )  # no pattern meets a run of blanks
    return tuple(clause for sentence in _SENTENCE.split(lines) for clause in _in_sentence(sentence))


@lru_cache(maxsize=16384)
def _in_sentence(sentence: str) -> tuple[Clause, ...]:
    """Rollouts of one prompt share many sentences, so these are remembered one by one."""
    result = []
    if is_chinese(sentence):
        said, question, scope = map(chinese_tokens, pieces(sentence)), asks(sentence), _CHINESE_SCOPE
    else:
        parts = (_NOT_NEGATIVE.sub(" ", _LETTER.sub(r" option \1 ", piece)) for piece in _CLAUSE.split(sentence))
        said, question, scope = map(text_tokens, parts), sentence.rstrip().endswith("?"), _SCOPE
    for tokens in filter(None, said):
        strong = tokens[0] in ("so", "then") or not _CUES.isdisjoint(tokens)
        result.append(Clause(tokens, strong, question or not _HEDGES.isdisjoint(tokens), scope))
    return tuple(result)


def name_tokens(text: str) -> tuple[str, ...]:
    """Of an option or the value of a fact, as they stand in reasoning."""
    return chinese_tokens(text, is_name=True) if is_chinese(text) else text_tokens(text)


def make_index(phrases: Iterable[tuple[tuple[str, ...], Any]]) -> Index:
    """(tokens, name) pairs -> lookup by first token; of equal phrases the first counts."""
    index: Index = {}
    for tokens, name in sorted(phrases, key=lambda phrase: -len(phrase[0])):
        if tokens:
            index.setdefault(tokens[0], []).append((tokens, name))
    return index


def mentions(clause: Clause, index: Index) -> list[Mention]:
    """What of the index a clause names, from left to right, the longest phrase winning; nothing where it hedges."""
    tokens, spans, free = clause.tokens, [], 0
    if clause.hedged or index.keys().isdisjoint(tokens):
        return []
    for start, token in enumerate(tokens):
        if start < free or token not in index:
            continue
        before, after = tokens[max(start - 1, 0) : start], tokens[start + 1 : start + 2]
        pronoun = not (_PRONOUN_BEFORE.isdisjoint(before) and _PRONOUN_AFTER.isdisjoint(after))
        for phrase, name in index[token]:
            if tokens[start : start + len(phrase)] == phrase and not (pronoun and phrase == ("1",)):
                free = start + len(phrase)
                spans.append((name, start, free))
                break
    inside = {at for _, start, end in spans for at in range(start, end)}
    negations = {
        at
        for at, token in enumerate(tokens)
        if at not in inside and (token in _NEGATORS or tokens[max(at - 1, 0) : at + 1] in _INSTEAD_OF)
    }
    result: list[Mention] = []
    chinese, rejected = clause.scope == _CHINESE_SCOPE, False
    stops = [*(start for _, start, _ in spans), len(tokens)][1:]
    for (name, start, end), stop in reversed([*zip(spans, stops, strict=True)]):
        joined = chinese and rejected and tokens[end:stop] in JOINED  # 甲和乙都不对
        after = (chinese and tokens[stop : stop + 1]) or ("",)  # 是甲不是乙
        ahead = pairwise((*tokens[end : min(stop, end + clause.scope // 2)], *after))
        rejected = joined or any(
            word in _REJECTED or (word in _NOT and following in _AFTER_NOT) for word, following in ahead
        )
        denied = rejected or not negations.isdisjoint(range(start - clause.scope, start))
        result.append(Mention(name, start, end, denied))
    return result[::-1]


@lru_cache(maxsize=4096)
def option_index(choices: tuple[str, ...]) -> Index:
    """Phrases that name an option, its text before `option B`; the name is the option's index."""
    classes = prepare(choices).classes
    texts = [(tokens, classes[i]) for i, choice in enumerate(choices) for tokens in _option_phrases(choice)]
    letters = [
        ((word, *between, option_letter(i).lower()), classes[i])
        for i in range(len(choices))
        for word in ("option", "choice", "letter", "answer")
        for between in ((), ("is",), ("is", "option"))
    ]
    return make_index([*texts, *letters])


def _option_phrases(choice: str) -> list[tuple[str, ...]]:
    if not is_chinese(choice):
        return [loose_key(choice)]
    tokens = chinese_tokens(choice, is_name=True)
    if says_nothing_alone(choice):
        return [("answer", "is", *tokens), ("choose", *tokens)]
    return [tokens, *filter(None, [measureless(tokens)])]


@lru_cache(maxsize=16384)
def concluded(think: str, choices: tuple[str, ...], question: str = "") -> int | None:
    """Index of the option that the reasoning commits to, or None where it commits to none or to several.

    A clause that concludes ("so", "the answer is", "must be") counts more than one that describes; hedges and
    questions commit to nothing; denied options are not named. Two options in a sequence ("bell then knock") are read
    by the question's "first" or "last".

    >>> options = ("bell", "knock")
    >>> concluded("It could be a knock, but the decay is long, so it is a bell.", options)
    0
    >>> concluded("There is a bell and a knock.", options) is None
    True
    """
    index, place = option_index(choices), _place_asked(question)
    last: set[int] = set()  # of the clauses that conclude
    plain: set[int] = set()
    for clause in clauses(think):
        named = [mention for mention in mentions(clause, index) if not mention.denied]
        asserted = {mention.name for mention in named}
        if place is not None and len(named) == len(asserted) == 2:
            between = clause.tokens[named[0].end : named[1].start]
            if not _THEN.isdisjoint(between):
                asserted = {named[-1 - place if "after" in between else place].name}
        last = (clause.strong and asserted) or last
        plain |= asserted
    options = last or plain
    return min(options) if len(options) == 1 else None


@lru_cache(maxsize=4096)
def _place_asked(question: str) -> int | None:
    """0 if the question asks for the first of several, -1 for the last, None otherwise."""
    words = {token for clause in clauses(question) for token in clause.tokens}
    places = [place for place, names in _PLACES.items() if not names.isdisjoint(words)]
    return places[0] if len(places) == 1 else None


def concluded_text(think: str, answer: str) -> bool | None:
    """For rows without options: does the reasoning state this answer? None where it neither states nor denies it."""
    phrase = name_tokens(bare(answer)) if is_chinese(answer) else loose_key(bare(answer))
    if len(phrase) > 50:
        return None
    index = make_index([(phrase, answer)])
    verdict: bool | None = None
    for clause in clauses(think):
        if named := mentions(clause, index):
            verdict = not named[-1].denied
        elif clause.strong and "answer" in clause.tokens:
            verdict = False  # "the answer is" something else
    return verdict


def supports(think: str | None, answer: str | None, choices: Sequence[str], question: str = "") -> bool | None:
    """Does the reasoning support the answer given? None where it commits to nothing; False without an answer."""
    if not think or not answer:
        return False
    if not choices:
        return concluded_text(think, answer)
    option = interpret(answer, choices, question)
    if option is None and any(map(is_chinese, (answer, *choices))):  # 三 for 3
        said = name_tokens(bare(answer))
        named = [i for i, choice in enumerate(choices) if said in _option_phrases(choice)]
        option = prepare(tuple(choices)).classes[named[0]] if len(named) == 1 else None
    conclusion = concluded(think, tuple(choices), question)
    return False if option is None else None if conclusion is None else conclusion == option
