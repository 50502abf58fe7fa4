"""Text that only looks like reasoning: repetition, word salad, keyword lists, an echo of the question.

`flaw` names what is wrong with a text, or None. All signs are linear in its length.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

from covo_rl.rewards.rules.normalize import MAX_CHARS

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


@lru_cache(maxsize=16384)
def words(text: str) -> tuple[str, ...]:
    """Lower-case words of a text; every CJK character counts as one."""
    text = text[:MAX_CHARS].lower()
    if not text.isascii():
        text = _CJK.sub(lambda match: f" {match.group()} ", text)
    return tuple(_WORD.findall(text.replace("\u2019", "'")))


def flaw(text: str, question: str = "", options: str = "") -> str | None:
    """Why a text is no reasoning: empty, repetition, gibberish, keyword list, word salad, echo - or None."""
    return next((what for wrong, what in _signs(text, question, options) if wrong), None)


def _signs(text: str, question: str, options: str) -> Iterator[tuple[bool, str]]:
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
    if question or options:
        own = [word for word in own_words(text, question, options) if len(word) > 1 or not word.isascii()]
        yield not own, "echo: only words of the question and the options"


def own_words(text: str, question: str, options: str) -> set[str]:
    """Content words that neither the question nor the options hold, nor a frame around the answer."""
    return set(words(text)).difference(words(question), words(options), _FUNCTION_WORDS, _FRAME)


def repeated_share(text: str) -> float:
    """Share of sentences that repeat an earlier one."""
    sentences = [said for part in re.split(r"[.!?;\n]+", text[:MAX_CHARS]) if (said := words(part))]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0
