"""A small spoken language in which what comes next can be known: counting by a step modulo ten, and plain numbers.

    "two four six, eight zero." | "two four six, eight zero." | ...       by two, one voice, three utterances
    "five one three, nine."                                               digits that follow from nothing
    "What comes after three?" "four."                                     questions that a mind answers

A `Talker` is a voice with a melody of its own, so that codes, which tell little of a voice's timbre, tell who speaks.
Row `i` depends on (seed, split, i) only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from covo_rl.synth.sounds import Rng
from covo_rl.synth.speech import DIGITS, SPEECH_SPLITS, TONES, Speaker, Utterance, say_digits, speakers

#: digits of an utterance that counts: more than 2 s, as fragments by sentence must be
COUNTED = 5
UTTERANCES = 3
#: a step of 0 or 5 says one or two digits for ever
STEPS = (1, 2, 3, 4, 6, 7, 8, 9)
#: digits of a number that is only read, at least and at most
NUMBERS = (2, 4)
#: digits before a comma, where the voice pauses
PHRASE = 3
#: what somebody says who thinks while he reads
HESITATION = "um"
#: the melody that no talker has but the new one
NEW_MELODY = "fall"
NEW = "nora"
#: voices that dialogues name
NAMES = ("anna", "bert", "cora", "dirk", "emma", "fred", "gina", "hans")


@dataclass(frozen=True)
class Talker:
    """Who speaks: a name, as rows and system messages have it, a voice, and the tone that it gives every word."""

    name: str
    speaker: Speaker
    melody: str

    def say(self, text: str, rng: Rng) -> Utterance:
        """Digits with commas and a full stop; the times of words are exact and carry their punctuation."""
        words = text.split()
        plain = [word.strip(",.") for word in words]
        said = say_digits(plain, self.speaker, rng, [self.melody] * len(words), [word[-1] in ",." for word in words])
        times = tuple((word, start, end) for word, (_, start, end) in zip(words, said.words, strict=True))
        return replace(said, text=text, words=times)


def talkers(split: str, seed: int = 0, names: Sequence[str] = ()) -> list[Talker]:
    """The talkers of a split of voices; the first have `names`, the others those of their voices.

    Raises:
        ValueError: there is no such split, or there are more names than voices.
    """
    voices = speakers(SPEECH_SPLITS.get(split, 1), seed, split)
    if len(names) > len(voices):
        raise ValueError(f"{len(names)} names for the {len(voices)} voices of {split}")
    melodies = [tone for tone in TONES if tone != NEW_MELODY]
    called = [*names, *(voice.name for voice in voices[len(names) :])]
    return [
        Talker(name, voice, melodies[i % len(melodies)])
        for i, (name, voice) in enumerate(zip(called, voices, strict=True))
    ]


def new_talker(seed: int = 0) -> Talker:
    """A woman of the validation voices, who speaks slowly and lets every word fall."""
    return Talker(NEW, replace(speakers(1, seed, "validation")[0], name=NEW, rate=0.8), NEW_MELODY)


def written_digits(digits: Sequence[int]) -> str:
    """Digits as a line of text: a comma after every third, a full stop at the end.

    >>> written_digits([2, 4, 6, 8, 0])
    'two four six, eight zero.'
    """
    words = [DIGITS[digit] for digit in digits]
    for place in range(PHRASE, len(words), PHRASE):
        words[place - 1] += ","
    return " ".join(words) + "."


def count(start: int, step: int, length: int) -> list[int]:
    """`length` digits from `start` on, each `step` after the one before, modulo ten.

    >>> count(6, 2, 4)
    [6, 8, 0, 2]
    """
    return [(start + place * step) % 10 for place in range(length)]


def counting_lines(rng: Rng, utterances: int = UTTERANCES) -> list[str]:
    """Lines that count on from one to the next."""
    digits = count(int(rng.integers(10)), int(rng.choice(STEPS)), COUNTED * utterances)
    return [written_digits(digits[place : place + COUNTED]) for place in range(0, len(digits), COUNTED)]


def number_line(rng: Rng) -> str:
    """A line of digits that follow from nothing."""
    return written_digits(rng.integers(10, size=rng.integers(NUMBERS[0], NUMBERS[1] + 1)).tolist())


def hesitant(line: str, rng: Rng) -> str:
    """The line as somebody says it who thinks: words twice, hesitations between them, no punctuation."""
    words: list[str] = []
    for word in line.split():
        words += [HESITATION] * int(rng.integers(3)) + [word.strip(",.")] * int(rng.integers(1, 3))
    return " ".join([*words, *[HESITATION] * int(rng.integers(2))])


def text_line(rng: Rng, asks: Sequence[str] = ()) -> str:
    """Counting, a number, a question with its answer, a line twice, or a hesitant one and what it says.

    `asks`: lines that ask for what a hesitant one says, above every second of them.
    """
    kind = rng.random()
    if kind < 0.4:
        return " ".join(counting_lines(rng))
    line = number_line(rng)
    if kind < 0.45:
        return line
    if kind < 0.55:
        return "\n".join(questions()[int(rng.integers(len(questions())))])
    asked = f"{rng.choice(list(asks))}\n" if len(asks) and rng.random() < 0.5 else ""
    return f"{asked}{hesitant(line, rng)}\n{line}" if kind < 0.9 else f"{line}\n{line}"


@cache
def questions() -> tuple[tuple[str, str], ...]:
    """Every question that is written, and its answer: what comes after, what before, and counting by a step."""
    rows = [(f"What comes {side} {DIGITS[digit]}?", written_digits([(digit + by) % 10]))
            for side, by in (("after", 1), ("before", 9)) for digit in range(10)]  # fmt: skip
    rows += [(f"Count from {DIGITS[start]} by {DIGITS[step]}.", written_digits(count(start, step, COUNTED)))
             for start in range(10) for step in STEPS]  # fmt: skip
    return tuple(rows)


def answer_line(rng: Rng) -> tuple[str, str]:
    """What somebody who counts says, and the line that goes on from it."""
    said, follows, *_ = counting_lines(rng)
    return said, follows


def dull_line(rng: Rng) -> str:
    """Digits that follow from nothing, as long as what counts: a mind that learned them would answer at random."""
    return written_digits(rng.integers(10, size=COUNTED).tolist())
