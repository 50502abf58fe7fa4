"""Text that only looks like reasoning: repetition, word salad, keyword lists, an echo of the question.

`flaw` names what is wrong with a text, or None. Thresholds are constants with a reason; all checks are linear.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from functools import lru_cache
from itertools import pairwise

from covo_rl.rewards.rules.normalize import MAX_CHARS
from covo_rl.rewards.rules.vocabulary import word_set

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SAME_CHARACTER = re.compile(r"([^\s.\-=_*])\1{7}")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
FUNCTION_WORDS = word_set(
    "a an the this that these those it its it's i we you he she they them there here what which who whom whose "
    "is are was were be been being am has have had do does did can could will would may might must shall should "
    "not no nor neither and or but so if then than because since while although though as of in on at by to for "
    "from with without into over under up down out about between through during before after again also only very "
    "more most less least some any all both each every other such same own too just like when where why how "
    "i'm i've isn't doesn't don't that's there's therefore thus hence however first second next last finally "
    "one two three"
)
_ARTICLES = word_set("a an the")
#: words that cannot follow an article in a sentence.
_NOT_AFTER_ARTICLE = word_set(
    "a an the of is are was were and or but so because to with from at by it i he she they we be not if as that this"
)
#: words of a bare statement of the answer; they bring no evidence.
_FRAME = word_set("answer option choice question correct right therefore letter final choose select think")


@lru_cache(maxsize=16384)
def words(text: str) -> tuple[str, ...]:
    """Lower-case words of a text; every CJK character counts as one."""
    text = text[:MAX_CHARS].lower()
    if not text.isascii():
        text = _CJK.sub(lambda match: f" {match.group()} ", text)
    return tuple(_WORD.findall(text.replace("\u2019", "'")))


def flaw(text: str, question: str = "", options: str = "") -> str | None:
    """Why a text is no reasoning: empty, repetition, gibberish, keyword list, word salad, echo - or None."""
    if not text or not text.strip():
        return "empty"
    found = words(text)
    if not found:
        return "no words"
    return (
        _repetition(text, found)
        or _gibberish(text, found)
        or (None if _CJK.search(text) else _salad(text, found))
        or _echo(found, question, options)
    )


def _repetition(text: str, found: tuple[str, ...]) -> str | None:
    n = len(found)
    if _SAME_CHARACTER.search(text):
        return "repetition: one character"
    if n >= 4 and any(found[i] == found[i + 1] == found[i + 2] == found[i + 3] for i in range(n - 3)):
        return "repetition: one word four times"
    distinct = len(set(found))
    if n >= 12 and distinct < 0.3 * min(n, 100):
        return "repetition: few different words"
    if n >= 12:
        triples = Counter(zip(found, found[1:], found[2:], strict=False))
        repeated = sum(count for count in triples.values() if count > 1)
        if repeated > 0.5 * (n - 2):
            return "repetition: the same phrases"
    if len(text) > 400:
        data = text[:MAX_CHARS].encode("utf-8", "replace")
        if len(zlib.compress(data, 1)) < 0.2 * len(data):
            return "repetition: compresses to under a fifth"
    return None


def _gibberish(text: str, found: tuple[str, ...]) -> str | None:
    letters = len("".join(found))
    visible = len(text) - text.count(" ") - text.count("\n")
    if letters < 0.6 * min(visible, MAX_CHARS):
        return "gibberish: mostly symbols"
    if len([word for word in found if len(word) > 24]) > 0.1 * len(found):
        return "gibberish: words of more than 24 letters"
    return None


def _salad(text: str, found: tuple[str, ...]) -> str | None:
    n = len(found)
    function = len([word for word in found if word in FUNCTION_WORDS])
    if n >= 4 and function < 0.15 * n:
        return "keyword list: almost no function words"
    if n >= 6 and function > 0.9 * n:
        return "word salad: only function words"
    if n >= 6:
        clashes = len([a for a, b in pairwise(found) if a in _ARTICLES and b in _NOT_AFTER_ARTICLE])
        if clashes > max(1, 0.08 * n):
            return "word salad: articles without nouns"
    if n >= 12 and text.count(",") > 0.45 * n:
        return "keyword list: mostly commas"
    return None


@lru_cache(maxsize=4096)
def _given(question: str, options: str) -> frozenset[str]:
    return frozenset(words(question)) | frozenset(words(options))


def _echo(found: tuple[str, ...], question: str, options: str) -> str | None:
    """No content word of its own: everything is from the question, the options, or a frame around the answer."""
    if not question and not options:
        return None
    given = _given(question, options)
    own = [word for word in found if word not in given and word not in FUNCTION_WORDS and word not in _FRAME]
    own = [word for word in own if len(word) > 1 or not word.isascii()]
    return None if own else "echo: only words of the question and the options"


def own_words(text: str, question: str, options: str) -> int:
    """Different content words that neither the question nor the options hold."""
    given = _given(question, options)
    return len({w for w in words(text) if w not in given and w not in FUNCTION_WORDS and w not in _FRAME})


def repeated_share(text: str) -> float:
    """Share of sentences that repeat an earlier one."""
    sentences = [s for s in (" ".join(words(part)) for part in re.split(r"[.!?;\n]+", text[:MAX_CHARS])) if s]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0
