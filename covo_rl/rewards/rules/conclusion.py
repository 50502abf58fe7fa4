"""What does a chain of reasoning conclude? The last option it commits to, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from covo_rl.prompt import option_letter
from covo_rl.rewards.rules.clauses import Clause, Index, clauses, make_index, mentions
from covo_rl.rewards.rules.normalize import loose_key
from covo_rl.rewards.rules.options import prepare, without_frame
from covo_rl.rewards.rules.vocabulary import word_set

_FIRST = word_set("1st start starts started begin begins beginning initial initially opens earliest")
_LAST = word_set("last end ends ended final finally closes latest")
_THEN = word_set("then before followed precedes preceding next")
_LETTER_BEFORE = ("option", "choice", "letter", "answer")


@lru_cache(maxsize=4096)
def option_index(choices: tuple[str, ...]) -> Index:
    """Phrases that name an option: its text, and `option B`; the name is the option's index as text."""
    options = prepare(choices)
    phrases = [(loose_key(choice), str(options.classes[i])) for i, choice in enumerate(choices)]
    for i in range(len(choices)):
        letter = option_letter(i).lower()
        for word in _LETTER_BEFORE:
            for between in ((), ("is",), ("is", "option")):
                phrases.append(((word, *between, letter), str(options.classes[i])))
    texts = {phrase for phrase, _ in phrases[: len(choices)]}
    return make_index(p for i, p in enumerate(phrases) if i < len(choices) or p[0] not in texts)


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
    index = option_index(choices)
    strong: list[set[int] | None] = []
    plain: list[set[int]] = []
    for clause in clauses(think):
        if clause.hedged:
            continue
        asserted = _asserted(clause, index, question)
        if not asserted:
            continue
        if clause.strong:
            strong.append(asserted)
        else:
            plain.append(asserted)
    if strong:
        last = strong[-1]
        return next(iter(last)) if last and len(last) == 1 else None
    named: set[int] = set().union(*plain)
    return next(iter(named)) if len(named) == 1 else None


def _asserted(clause: Clause, index: Index, question: str) -> set[int]:
    found = [mention for mention in mentions(clause, index) if not mention.denied]
    named = {int(mention.name) for mention in found}
    if len(named) == 2 and len(found) == 2:
        between = clause.tokens[found[0].end : found[1].start]
        ordered = [int(mention.name) for mention in found]
        if "after" in between:
            ordered.reverse()
        elif _THEN.isdisjoint(between):
            return named
        place = _place_asked(question)
        if place is not None:
            return {ordered[place]}
    return named


@lru_cache(maxsize=4096)
def _place_asked(question: str) -> int | None:
    """0 if the question asks for the first of several, -1 for the last, None otherwise."""
    words = {token for clause in clauses(question) for token in clause.tokens}
    first, last = bool(words & _FIRST), bool(words & _LAST)
    return None if first == last else 0 if first else -1


def concluded_text(think: str, answer: str) -> bool | None:
    """For rows without options: does the reasoning state this answer? None where it neither states nor denies it."""
    phrase = loose_key(without_frame(answer))
    if len(phrase) > 50:
        return None
    index = make_index([(phrase, "answer")])
    verdict: bool | None = None
    for clause in clauses(think):
        found = [] if clause.hedged else mentions(clause, index)
        if found:
            verdict = not found[-1].denied
        elif clause.strong and "answer" in clause.tokens:
            verdict = False  # "the answer is" something else
    return verdict


def supports(think: str | None, answer: str | None, choices: Sequence[str], question: str = "") -> bool | None:
    """Does the reasoning support the answer given? None where it commits to nothing; False without an answer."""
    from covo_rl.rewards.rules.options import interpret

    if not think or not answer:
        return False
    if not choices:
        return concluded_text(think, answer)
    given = interpret(answer, choices)
    if given is None:
        return False
    held = concluded(think, tuple(choices), question)
    return None if held is None else held == given
