"""Claims about the clip in a chain of reasoning, checked against the ground truth of the row.

A row may carry `facts`, a mapping fact -> true value, and `fact_lexicon`, fact -> all values it could have had. A
clause that names a value of a fact claims it; naming another value than the true one is a false claim, denying the
true one as well. Hedged clauses and questions claim nothing. Numbers may be digits or words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from covo_rl.rewards.rules.clauses import Clause, Index, clauses, make_index, mentions, word_tokens
from covo_rl.rewards.rules.vocabulary import word_set

_GENERIC = word_set("count number of the total how many n")
_SEQUENCE = word_set("then before followed next after")


@dataclass(frozen=True, slots=True)
class Claim:
    """`value` of `fact` is asserted, or denied; `true` against the row; `clause` is its position in the text."""

    fact: str
    value: str
    denied: bool
    true: bool
    clause: int


def claims(think: str, facts: Mapping[str, Any] | None, lexicon: Mapping[str, Any] | None = None) -> list[Claim]:
    """All checkable claims, in order.

    >>> [c.true for c in claims("I hear two bells, not three.", {"n": "two"}, {"n": ["one", "two", "three"]})]
    [True, True]
    """
    if not facts:
        return []
    known = {name: value for name, value in facts.items() if value is not None}
    listed = {name: list(values) for name, values in (lexicon or {}).items() if values is not None}
    indexes, plain = _prepare(_freeze(known), tuple((name, tuple(map(str, v))) for name, v in listed.items()))
    found: list[Claim] = []
    for position, clause in enumerate(clauses(think)):
        if clause.hedged:
            continue
        for fact, truth, index in indexes:
            for mention in mentions(clause, index):
                right = mention.name == truth
                found.append(Claim(fact, mention.name, mention.denied, right != mention.denied, position))
        for fact, value in plain:
            found += _unlisted(clause, position, fact, value)
    return found


def _freeze(facts: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, tuple(v) if isinstance(v, (list, tuple)) else v) for name, v in facts.items())


Prepared = tuple[list[tuple[str, str, Index]], list[tuple[str, Any]]]


@lru_cache(maxsize=4096)
def _prepare(facts: tuple[tuple[str, Any], ...], lexicon: tuple[tuple[str, tuple[str, ...]], ...]) -> Prepared:
    listed = dict(lexicon)
    indexes, plain = [], []
    for fact, value in facts:
        if fact not in listed:
            plain.append((fact, value))
            continue
        truth = " ".join(word_tokens(_as_text(value)))
        values = dict.fromkeys([*listed[fact], _as_text(value)])
        indexes.append((fact, truth, make_index((word_tokens(v), " ".join(word_tokens(v))) for v in values)))
    return indexes, plain


def _as_text(value: Any) -> str:
    return " then ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _unlisted(clause: Clause, position: int, fact: str, value: Any) -> list[Claim]:
    """Facts without a lexicon: numbers beside a word of the fact's name, sequences, and the true value itself."""
    if isinstance(value, bool):
        return []
    if isinstance(value, (int, float)):
        nouns = set(word_tokens(fact.replace("_", " "))) - _GENERIC
        near = any(token == noun or token == noun + "s" for token in clause.tokens for noun in nouns)
        numbers = [str(n) for n in range(21)]
        index = make_index(((n,), n) for n in numbers) if near else {}
        truth = f"{value:g}"
        return [Claim(fact, m.name, m.denied, (m.name == truth) != m.denied, position) for m in mentions(clause, index)]
    if isinstance(value, (list, tuple)):
        return _sequence(clause, position, fact, [" ".join(word_tokens(str(v))) for v in value])
    tokens = word_tokens(str(value))
    found = mentions(clause, make_index([(tokens, " ".join(tokens))]))
    return [Claim(fact, m.name, m.denied, not m.denied, position) for m in found]


def _sequence(clause: Clause, position: int, fact: str, order: Sequence[str]) -> list[Claim]:
    if _SEQUENCE.isdisjoint(clause.tokens):
        return []
    index = make_index((tuple(name.split()), name) for name in order)
    said = [m.name for m in mentions(clause, index) if not m.denied]
    if "after" in clause.tokens:
        said.reverse()
    if len(said) < 2:
        return []
    rest = iter(order)
    return [Claim(fact, " then ".join(said), False, all(name in rest for name in said), position)]
