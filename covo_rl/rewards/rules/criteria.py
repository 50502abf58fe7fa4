"""The five criteria of R_thinking, decided without a judge. Each is a documented, deterministic stand-in.

    soundness            the reasoning commits to the answer that is given, and to no other
    factual_correctness  every claim about the clip agrees with the row's facts, and there is at least one;
                         rows without facts: the *grounding proxy*, evidence that is heard and not from the question
    error_identification nothing wrong is left standing: the last claim about every fact is true, and the option that
                         the reasoning ends on is the right one
    coherence            no degenerate text
    conciseness          within the length window, without sentences said twice, and with some evidence or conclusion

Degenerate text (see degenerate.py) fails all five. A row may carry `facts`, fact -> true value, and `fact_lexicon`,
fact -> all values it could have had; a clause that names one of them claims it, unless it hedges or asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from covo_rl.rewards.rules.clauses import Index, clauses, make_index, mentions
from covo_rl.rewards.rules.conclusion import concluded, concluded_text, supports
from covo_rl.rewards.rules.degenerate import flaw, own_words, repeated_share, words
from covo_rl.rewards.rules.normalize import text_tokens
from covo_rl.rewards.rules.options import find_gold

CRITERIA = ("soundness", "factual_correctness", "error_identification", "coherence", "conciseness")
MIN_WORDS, MAX_WORDS = 4, 300
_HEARING = re.compile(
    r"\b(?:hear|heard|hearing|listen\w*|sound\w*|audio|clip|recording|voice\w*|nois\w+|tone\w*|pitch\w*|note\w*|beat\w*|"
    r"rhythm\w*|loud\w*|quiet\w*|soft\w*|melod\w+|speak\w*|said|says|sings?|singing|instrument\w*|ring\w*|music\w*)\b",
    re.IGNORECASE,
)
_SEQUENCE = frozenset("then before followed next after".split())
#: words of a fact's name that say nothing of what is counted
_GENERIC = frozenset("count number of the total how many n".split())


def judge_free(
    think: str | None, answer: str | None, *, question: str = "", choices: Sequence[str] = (), gold: Any = None,
    facts: Mapping[str, Any] | None = None, lexicon: Mapping[str, Any] | None = None,
    min_words: int = MIN_WORDS, max_words: int = MAX_WORDS,
) -> dict[str, bool]:  # fmt: skip
    """Criterion -> met, for one completion."""
    options = ", ".join(choices)
    if not think or flaw(think, question, options):
        return dict.fromkeys(CRITERIA, False)
    said = claims(think, facts, lexicon)
    last = {claim.fact: claim.true for claim in said if not claim.denied}
    support = supports(think, answer, choices, question)
    three_words = len(own_words(think, question, options)) >= 3
    if facts:
        grounded = any(claim.true and not claim.denied for claim in said)
    else:  # the grounding proxy: it speaks of hearing, and brings three content words of its own
        grounded = three_words and bool(_HEARING.search(think[:2000]))
    substantial = grounded or support is not None
    concise = min_words <= len(words(think)) <= max_words and repeated_share(think) <= 0.25
    return {
        "soundness": grounded if support is None else support,
        "factual_correctness": grounded and all(claim.true for claim in said),
        "error_identification": substantial and all(last.values()) and _ends_right(think, choices, gold, question),
        "coherence": substantial or three_words,
        "conciseness": substantial and concise,
    }


def _ends_right(think: str, choices: Sequence[str], gold: Any, question: str) -> bool:
    if not choices:
        return gold is None or concluded_text(think, str(gold)) is not False
    conclusion, right = concluded(think, tuple(choices), question), find_gold(gold, choices)
    return conclusion is None or right is None or conclusion == right


@dataclass(frozen=True, slots=True)
class Claim:
    """A value of `fact` is asserted, or denied; `true` against the row."""

    fact: str
    denied: bool
    true: bool


def claims(think: str, facts: Mapping[str, Any] | None, lexicon: Mapping[str, Any] | None = None) -> list[Claim]:
    """All checkable claims about the clip, in order for every fact.

    Naming another value than the true one is a false claim, denying the true one as well. Without a lexicon a fact is
    known by its true value, a number also by others beside a word of the fact's name, a list by what comes after what.

    >>> [c.true for c in claims("I hear two bells, not three.", {"n": "two"}, {"n": ["one", "two", "three"]})]
    [True, True]
    """
    result: list[Claim] = []
    for fact, value in (facts or {}).items():
        values = (lexicon or {}).get(fact)
        if value is None or (values is None and isinstance(value, bool)):
            continue
        if values is None and isinstance(value, (list, tuple)):
            result += _sequences(think, fact, value)
            continue
        nouns = None
        text = " then ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        index, truth = _index((*map(str, values or ()), text)), " ".join(_tokens(text))
        if values is None and isinstance(value, (int, float)):
            index, truth = _index(tuple(map(str, range(21)))), f"{value:g}"
            nouns = set(_tokens(fact.replace("_", " "))) - _GENERIC
            nouns |= {noun + "s" for noun in nouns}
        for clause in clauses(think):
            if not clause.hedged and (nouns is None or not nouns.isdisjoint(clause.tokens)):
                for mention in mentions(clause, index):
                    result.append(Claim(fact, mention.denied, (mention.name == truth) != mention.denied))
    return result


def _sequences(think: str, fact: str, order: Iterable[Any]) -> list[Claim]:
    """One claim for every clause that puts two or more of a sequence in order."""
    result = []
    index = _index(tuple(map(str, order)))
    for clause in clauses(think):
        if clause.hedged or _SEQUENCE.isdisjoint(clause.tokens):
            continue
        names = [mention.name for mention in mentions(clause, index) if not mention.denied]
        if "after" in clause.tokens:
            names.reverse()
        rest = iter([" ".join(_tokens(str(value))) for value in order])
        if len(names) >= 2:
            result.append(Claim(fact, False, all(name in rest for name in names)))
    return result


@lru_cache(maxsize=4096)
def _index(values: tuple[str, ...]) -> Index:
    return make_index((_tokens(value), " ".join(_tokens(value))) for value in values)


@lru_cache(maxsize=4096)
def _tokens(phrase: str) -> tuple[str, ...]:
    """A phrase as clauses would show it."""
    return tuple(text_tokens(phrase))
