"""What does a chain of reasoning conclude? The last option it commits to, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from covo_rl.prompt import option_letter
from covo_rl.rewards.rules.clauses import Clause, Index, clauses, make_index, mentions
from covo_rl.rewards.rules.normalize import loose_key
from covo_rl.rewards.rules.options import interpret, prepare, without_frame

#: place in a sequence -> words of a question that ask for it
_PLACES = {
    0: frozenset("1st start starts started begin begins beginning initial initially opens earliest".split()),
    -1: frozenset("last end ends ended final finally closes latest".split()),
}
_THEN = frozenset("then before followed precedes preceding next".split())


@lru_cache(maxsize=4096)
def _option_index(choices: tuple[str, ...]) -> Index:
    """Phrases that name an option, its text before `option B`; the name is the option's index."""
    classes = prepare(choices).classes
    texts = [(loose_key(choice), classes[i]) for i, choice in enumerate(choices)]
    letters = [
        ((word, *between, option_letter(i).lower()), classes[i])
        for i in range(len(choices))
        for word in ("option", "choice", "letter", "answer")
        for between in ((), ("is",), ("is", "option"))
    ]
    return make_index([*texts, *letters])


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
    index = _option_index(choices)
    strong: list[set[int]] = []
    plain: set[int] = set()
    for clause in clauses(think):
        asserted = set() if clause.hedged else _asserted(clause, index, question)
        if asserted and clause.strong:
            strong.append(asserted)
        plain |= asserted
    options = strong[-1] if strong else plain
    return min(options) if len(options) == 1 else None


def _asserted(clause: Clause, index: Index, question: str) -> set[int]:
    named = [mention for mention in mentions(clause, index) if not mention.denied]
    order = [mention.name for mention in named]
    if len(named) == 2 and order[0] != order[1]:
        between = clause.tokens[named[0].end : named[1].start]
        if "after" in between:
            order.reverse()
        elif _THEN.isdisjoint(between):
            return set(order)
        place = _place_asked(question)
        return set(order) if place is None else {order[place]}
    return set(order)


@lru_cache(maxsize=4096)
def _place_asked(question: str) -> int | None:
    """0 if the question asks for the first of several, -1 for the last, None otherwise."""
    words = {token for clause in clauses(question) for token in clause.tokens}
    places = [place for place, names in _PLACES.items() if not names.isdisjoint(words)]
    return places[0] if len(places) == 1 else None


def concluded_text(think: str, answer: str) -> bool | None:
    """For rows without options: does the reasoning state this answer? None where it neither states nor denies it."""
    phrase = loose_key(without_frame(answer))
    if len(phrase) > 50:
        return None
    index = make_index([(phrase, answer)])
    verdict: bool | None = None
    for clause in clauses(think):
        named = [] if clause.hedged else mentions(clause, index)
        if named:
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
    option = interpret(answer, choices)
    conclusion = concluded(think, tuple(choices), question)
    return False if option is None else None if conclusion is None else conclusion == option
