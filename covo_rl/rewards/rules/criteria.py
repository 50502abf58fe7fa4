"""The five criteria of R_thinking, decided without a judge. Each is a documented, deterministic stand-in.

    soundness            the reasoning commits to the answer that is given, and to no other
    factual_correctness  every claim about the clip agrees with the row's facts, and there is at least one;
                         rows without facts: the *grounding proxy*, evidence that is heard and not from the question
    error_identification nothing wrong is left standing: the last claim about every fact is true, and the option that
                         the reasoning ends on is the right one
    coherence            no degenerate text
    conciseness          within the length window, without sentences said twice, and with some evidence or conclusion

Degenerate text, which only looks like reasoning (see `flaw`), fails all five. A row may carry `facts`, fact -> true
value, and `fact_lexicon`, fact -> all values it could have had; a clause that names one of them claims it, unless it
hedges or asks.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from covo_rl.rewards.rules.answers import find_gold
from covo_rl.rewards.rules.chinese import EMPTY, chinese_flaw, is_chinese, measureless
from covo_rl.rewards.rules.reasoning import (
    Index,
    clauses,
    concluded,
    concluded_text,
    make_index,
    mentions,
    name_tokens,
    option_index,
    supports,
)
from covo_rl.rewards.rules.text import MAX_CHARS

CRITERIA = ("soundness", "factual_correctness", "error_identification", "coherence", "conciseness")
#: what a criterion asks for, in a few words
UNMET = {
    "soundness": "does not lead to the answer given",
    "factual_correctness": "a false claim about the clip, or no evidence of its own",
    "error_identification": "something wrong is left standing, or nothing is said",
    "coherence": "says nothing",
    "conciseness": "too short, too long, or said twice",
}
MIN_WORDS, MAX_WORDS = 4, 300
_HEARING = re.compile(
    r"\b(?:hear|heard|hearing|listen\w*|sound\w*|audio|clip|recording|voice\w*|nois\w+|tone\w*|pitch\w*|note\w*|beat\w*|"
    r"rhythm\w*|loud\w*|quiet\w*|soft\w*|melod\w+|speak\w*|said|says|sings?|singing|instrument\w*|ring\w*|music\w*)\b"
    "|[听声音响噪唱乐]|节奏|旋律|语气|语速|说话",
    re.IGNORECASE,
)
#: somebody hears, or it is heard; not what the question says of "you"
_PERCEIVES = re.compile(
    r"\b(?:i|we) (?:\w+ ){0,2}(?:hear|heard|listen|listened|recognise|recognize|perceive|notice)\b"
    r"|\b(?:is|are|was|were|be) (?:\w+ )?(?:heard|audible)\b|\bsounds? like\b|\bit sounds\b"
)
_SEQUENCE = frozenset("then before followed next after".split())
#: words of a fact's name that say nothing of what is counted
_GENERIC = frozenset("count number of the total how many n".split())
_SENTENCE_END = re.compile("[.!?;\n\u3002\uff01\uff1f\uff1b]+")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SAME_CHARACTER = re.compile(r"([^\s.\-=_*])\1{7}")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_FUNCTION_WORDS = frozenset(
    "a an the this that these those it its it's i we you he she they them there here what which who whom whose "
    "is are was were be been being am has have had do does did can could will would may might must shall should "
    "not no nor neither and or but so if then than because since while although though as of in on at by to for "
    "from with without into over under up down out about between through during before after again also only very "
    "more most less least some any all both each every other such same own too just like when where why how "
    "i'm i've isn't doesn't don't that's there's therefore thus hence however first second next last finally "
    "one two three".split()
)
_ARTICLES = frozenset(("a", "an", "the"))
#: words that cannot follow an article in a sentence.
_NOT_AFTER_ARTICLE = frozenset(
    "a an the of is are was were and or but so because to with from at by it i he she they we be not if as that "
    "this".split()
)
#: words of a bare statement of the answer; they bring no evidence.
_FRAME = frozenset("answer option choice question correct right therefore letter final choose select think".split())


def judge_free(
    think: str | None, answer: str | None, *, question: str = "", choices: Sequence[str] = (), gold: Any = None,
    facts: Mapping[str, Any] | None = None, lexicon: Mapping[str, Any] | None = None,
    min_words: int = MIN_WORDS, max_words: int = MAX_WORDS,
) -> dict[str, bool]:  # fmt: skip
    """Criterion -> met, for one completion."""
    options = ", ".join(choices)
    if not think or flaw(think, question, options, choices):
        return dict.fromkeys(CRITERIA, False)
    claimed = claims(think, facts, lexicon)
    last = {claim.fact: claim.true for claim in claimed if not claim.denied}
    support = supports(think, answer, choices, question)
    three_words = content(own_words(think, question, options)) >= 3
    if facts:
        grounded = any(claim.true and not claim.denied for claim in claimed)
    else:  # the grounding proxy: it speaks of hearing, and brings three content words of its own
        grounded = three_words and bool(_HEARING.search(think[:2000]))
    substantial = grounded or support is not None
    sentences = [said for part in _SENTENCE_END.split(think[:MAX_CHARS]) if (said := words(part))]
    few_repeated = len(set(sentences)) >= 0.75 * len(sentences)
    if choices:
        conclusion, right = concluded(think, tuple(choices), question), find_gold(gold, choices)
        ends_right = None in (conclusion, right) or conclusion == right
    else:
        ends_right = gold is None or concluded_text(think, str(gold)) is not False
    return {
        "soundness": grounded if support is None else support,
        "factual_correctness": grounded and all(claim.true for claim in claimed),
        "error_identification": substantial and all(last.values()) and ends_right,
        "coherence": substantial or three_words,
        "conciseness": substantial and few_repeated and min_words <= len(words(think)) <= max_words,
    }


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
        index, truth = _index((*map(str, values or ()), text)), " ".join(name_tokens(text))
        if values is None and isinstance(value, (int, float)):
            index, truth = _index(tuple(map(str, range(21)))), f"{value:g}"
            nouns = set(name_tokens(fact.replace("_", " "))) - _GENERIC
            nouns |= {noun + "s" for noun in nouns}
        for clause in clauses(think):
            if nouns is None or not nouns.isdisjoint(clause.tokens):
                for mention in mentions(clause, index):
                    result.append(Claim(fact, mention.denied, (mention.name == truth) != mention.denied))
    return result


def _sequences(think: str, fact: str, order: Iterable[Any]) -> list[Claim]:
    """One claim for every clause that puts two or more of a sequence in order."""
    result = []
    index = _index(tuple(map(str, order)))
    for clause in clauses(think):
        names = [mention.name for mention in mentions(clause, index) if not mention.denied]
        if len(names) >= 2 and not _SEQUENCE.isdisjoint(clause.tokens):
            rest = iter([" ".join(name_tokens(str(value))) for value in order])
            in_order = reversed(names) if "after" in clause.tokens else names
            result.append(Claim(fact, False, all(name in rest for name in in_order)))
    return result


@lru_cache(maxsize=4096)
def _index(values: tuple[str, ...]) -> Index:
    names = [name_tokens(value) for value in values]
    bare = [(number, " ".join(name)) for name in names if (number := measureless(name))]
    return make_index([*((name, " ".join(name)) for name in names), *bare])


@lru_cache(maxsize=16384)
def words(text: str, limit: int | None = MAX_CHARS) -> tuple[str, ...]:
    """Lower-case words of the first `limit` characters of a text; every CJK character counts as one."""
    text = text[:limit].lower()
    if not text.isascii():
        text = _CJK.sub(lambda match: f" {match.group()} ", text)
    return tuple(_WORD.findall(text.replace("\u2019", "'")))


def flaw(text: str, question: str = "", options: str = "", choices: Sequence[str] = ()) -> str | None:
    """Why a text is no reasoning: empty, repetition, gibberish, keyword list, word salad, echo - or None."""
    return next((what for wrong, what in _signs(text, question, options, choices) if wrong), None)


def _signs(text: str, question: str, options: str, choices: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """(whether the text has it, the flaw), the surest first; the caller stops at the first."""
    said = words(text)
    n = len(said)
    yield not text.strip(), "empty"
    yield n == 0, "no words"
    yield bool(_SAME_CHARACTER.search(text)), "repetition: one character"
    yield any(said[i : i + 4] == (said[i],) * 4 for i in range(n - 3)), "repetition: one word four times"
    yield n >= 12 and len(set(said)) < 0.3 * min(n, 100), "repetition: few different words"
    triples = Counter(zip(said, said[1:], said[2:], strict=False))
    repeated = sum(count for count in triples.values() if count > 1)
    yield n >= 12 and repeated > 0.5 * (n - 2), "repetition: the same phrases"
    data = text[:MAX_CHARS].encode("utf-8", "replace")
    yield len(text) > 400 and len(zlib.compress(data, 1)) < 0.2 * len(data), "repetition: compresses to under a fifth"
    visible = len(text) - text.count(" ") - text.count("\n")
    yield sum(map(len, said)) < 0.6 * min(visible, MAX_CHARS), "gibberish: mostly symbols"
    yield sum(len(word) > 24 for word in said) > 0.1 * n, "gibberish: words of more than 24 letters"
    if not _CJK.search(text):
        function = sum(word in _FUNCTION_WORDS for word in said)
        clashes = sum(a in _ARTICLES and b in _NOT_AFTER_ARTICLE for a, b in pairwise(said))
        yield n >= 4 and function < 0.15 * n, "keyword list: almost no function words"
        yield n >= 6 and function > 0.9 * n, "word salad: only function words"
        yield n >= 6 and clashes > max(1, 0.08 * n), "word salad: articles without nouns"
        yield n >= 12 and text.count(",") > 0.45 * n, "keyword list: mostly commas"
    elif is_chinese(text):
        wrong = chinese_flaw(text)
        yield wrong is not None, wrong or ""
    if question or options:
        own = [word for word in own_words(text, question, options) if len(word) > 1 or not word.isascii()]
        yield not own and not _hears(text, choices), "echo: only words of the question and the options"


def _hears(text: str, choices: Sequence[str]) -> bool:
    """Somebody says that one of the options is heard: "I hear Danish", though the question asks what "you hear"."""
    if not choices:
        return False
    index = option_index(tuple(choices))
    heard = [clause for clause in clauses(text) if _PERCEIVES.search(" ".join(clause.tokens))]
    return any(
        len({mention.name for mention in mentions(clause, index) if not mention.denied}) == 1 for clause in heard
    )


def own_words(text: str, question: str, options: str) -> set[str]:
    """Content words that neither the question nor the options hold, nor a frame around the answer."""
    empty = EMPTY if is_chinese(text) else ()
    return set(words(text)).difference(words(question), words(options), _FUNCTION_WORDS, _FRAME, empty)


def content(own: Iterable[str]) -> float:
    """How many words these are, where two Chinese characters make one."""
    return sum(0.5 if is_chinese(word) else 1.0 for word in own)
