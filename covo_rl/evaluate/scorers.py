"""Official scorers, re-implemented from their rules, and the strict one.

A scorer says True (right), False (wrong) or None (the official script drops the row from its denominator).
None of them guesses: there is no random choice when nothing can be read.

    token_set_match    MMAU and MMAR: the answer's words are there, words of other options are not
    letter_rule        MMSU and AIR-Bench: first character, else second-last
    strict_match       the accuracy reward's matcher, on the extracted answer or on the whole reply
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from covo_rl.prompt import Parsed

#: (reply, choices, answer) -> right, wrong, or not scored by the official script.
Scorer = Callable[[object, Sequence[str], str], bool | None]

_WORD = re.compile(r"\w+")
LETTERS = "ABCD"


def reply_words(text: str) -> frozenset[str]:
    """Lower-cased maximal runs of Unicode word characters (letters, digits, underscore), as a set."""
    return frozenset(_WORD.findall(text.lower()))


def token_set_match(reply: object, choices: Sequence[str], answer: str) -> bool | None:
    """The rule of MMAU's and MMAR's evaluation scripts (Sakshi113/MMAU @110127f, ddlBoJack/MMAR @3bce090).

    Right when every word of the answer is in the reply and no word that only other options have is. Word order,
    negation and letters play no part, so "not a dog" is right for "dog" and "A" is wrong. A missing reply (None or
    not a string) is None: the scripts skip such rows.

    >>> token_set_match("(A) dog", ["dog", "cat"], "dog"), token_set_match("dog and cat", ["dog", "cat"], "dog")
    (True, False)
    """
    if not isinstance(reply, str):
        return None
    said, wanted = reply_words(reply), reply_words(answer)
    if not said:
        return False
    forbidden = frozenset().union(*(reply_words(choice) - wanted for choice in choices))
    return wanted <= said and not (said & forbidden)


def read_letter(reply: str) -> str | None:
    """The option letter that MMSU's script reads: the first character, else the second-last; None if neither is A-D.

    >>> read_letter("Dog"), read_letter("The answer is B."), read_letter("The answer is B")
    ('D', 'B', None)
    """
    text = reply.strip().replace("\n", "")
    if text and text[0] in LETTERS:
        return text[0]
    if len(text) > 1 and text[-2] in LETTERS:
        return text[-2]
    return None


def letter_rule(reply: object, choices: Sequence[str], answer: str) -> bool | None:
    """The rule of MMSU's evaluation script (dingdongwang/MMSU @217d1d3, 2026-02-12).

    An empty reply or the word None is wrong; a reply without a readable letter, and one that is not a string, is
    None: numerator and denominator both lose the row. Otherwise the option under the letter must equal the answer
    text, so with duplicate options both letters are right.

    >>> letter_rule("Dog", ["ant", "bee", "cow", "dog"], "dog"), letter_rule("(A).", ["ant", "bee"], "ant")
    (True, None)
    """
    if not isinstance(reply, str):
        return None
    text = reply.strip().replace("\n", "")
    if not text or text == "None":
        return False
    letter = read_letter(reply)
    if letter is None:
        return None
    index = LETTERS.index(letter)
    return index < len(choices) and choices[index] == answer


def strict_match(text: str | None, choices: Sequence[str], answer: str, question: str = "") -> bool:
    """The accuracy reward's verdict on an answer text; None (nothing extracted) and empty text are wrong.

    Uses the reward itself (`rewards/accuracy.py`), so evaluation and training cannot disagree. What the reward
    cannot grade (an answer key that is not among the options) is wrong here.
    """
    if text is None or not text.strip():
        return False
    parsed = Parsed(think=None, answer=text.strip())
    score = _accuracy()(
        completions=[text], answer=[answer], choices=[list(choices)], question=[question], parsed=[parsed]
    )[0]
    return score is not None and score >= 1.0


@cache
def _accuracy() -> Callable[..., list[float | None]]:
    from covo_rl import rewards

    return rewards.load_reward("accuracy")
