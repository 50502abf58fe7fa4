"""A transcript and its codes, cut at the same places: fragments of phrases, or of whole sentences.

    text    |one, two|  three four.|       pieces of the text as it stands: joined they are the text
    codes   |0 ... 31|32 ...     70|       codes [a, b), which are samples [960 a, 960 b)

Between two words the cut is half-way through the pause, on the grid of codes.
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain.document import SkippedError
from covo_rl.types import visible

#: codes of a second
CODE_RATE = 25
#: after which a phrase may end, and a sentence
PHRASE_ENDS = frozenset(".,;:!?。．｡，、､；：！？")  # noqa: RUF001
SENTENCE_ENDS = frozenset(".!?。．｡！？")  # noqa: RUF001
PAUSE = 0.25
#: codes: the shortest and the longest of a level's fragments, 0.8 to 4 s and 2 to 30 s
PHRASE_CODES, SENTENCE_CODES = (20, 100), (50, 750)


@dataclass(frozen=True)
class Fragment:
    """A piece of a row: its text, and codes [a, b) of its recording. codes: those themselves, (b-a,), where known."""

    text: str
    a: int
    b: int
    row: str
    codes: np.ndarray | Sequence[int] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return self.b - self.a


class WordsError(SkippedError):
    """The words of a row are not those of its text; the message names the first that is not."""

    def __init__(self, row: str, word: str) -> None:
        super().__init__("its words are not those of its text", row)
        self.args = (f"{self}: {word}",)


@dataclass(frozen=True)
class _Cut:
    """A place between two words: in the text, in codes; whether a fragment may end there of itself."""

    text: int
    code: int
    ends: bool


def whole_row(row: SpeechRow) -> Fragment:
    """The row as one fragment."""
    return _fragment(row, (0, len(row.text)), (0, row.code_count()))


def phrase_fragments(row: SpeechRow) -> list[Fragment]:
    """A fragment ends at punctuation or a pause of 0.25 s once it has 0.8 s, and before a word that takes it over 4 s.

    A last one under 0.8 s joins the one before. A word over 4 s stays whole.

    Raises:
        SkippedError: no text, no words, or words that are not those of the text.
        AudioError: a row without codes whose recording cannot be read.
    """
    length = row.code_count()
    return _fragments(row, length, _split(_places(row, length, _phrase_ends), length, *PHRASE_CODES))


def sentence_fragments(rows: Sequence[SpeechRow]) -> list[Fragment]:
    """A row of a document is a fragment; one over 30 s, or one by itself, is cut where sentences end.

    Sentences under 2 s go on into the next; a row is never joined to another, however short. From the second row on a
    text begins with a space, where its script has spaces: so joined they are the text of the document.

    Raises:
        SkippedError: no text, or over 30 s without the end of a sentence, or without times of words.
        AudioError: a row without codes whose recording cannot be read.
    """
    fragments: list[Fragment] = []
    for row in rows:
        length = row.code_count()
        cuts: list[_Cut] = []
        if row.words and (length > SENTENCE_CODES[1] or len(rows) == 1):
            places = [place for place in _places(row, length, _sentence_ends) if place.ends]
            cuts = _split(places, length, *SENTENCE_CODES, strict=True)
        parts = _fragments(row, length, cuts)
        if max(map(len, parts)) > SENTENCE_CODES[1]:
            raise SkippedError("a sentence of more than 30 s" if row.words else "more than 30 s, and no words", row.id)
        fragments += parts
    return spaced(fragments)


def draw_fragments(rows: Sequence[SpeechRow], rng: random.Random, share: float, least: int = 2) -> list[Fragment]:
    """The fragments of a document by sentence, with probability `share`, or by phrase.

    Where the drawn level gives fewer than `least`, the other is taken; with a share of 0 or 1 there is no other.

    Raises:
        SkippedError: no level gives so many.
    """
    levels = [sentence_fragments, _phrases] if rng.random() < share else [_phrases, sentence_fragments]
    reasons = []
    for level in levels[: 1 if share in (0, 1) else 2]:
        try:
            fragments = level(rows)
        except SkippedError as error:
            reasons.append(error)
            continue
        if len(fragments) >= least:
            return fragments
    raise reasons[0] if reasons else SkippedError("fewer than two fragments", rows[0].id)


def spaced(fragments: Sequence[Fragment]) -> list[Fragment]:
    """Fragments of several rows, with a space between the texts of two rows, unless one is there or none is written."""
    result: list[Fragment] = []
    for fragment in fragments:
        if result and result[-1].row != fragment.row and _parted(result[-1].text, fragment.text):
            text = f" {fragment.text}"
            fragment = Fragment(text, fragment.a, fragment.b, fragment.row, fragment.codes)
        result.append(fragment)
    return result


def locate(row: SpeechRow) -> list[tuple[int, int]]:
    """Where each word stands in the text: from its first character to the one after its last.

    Punctuation may stand in the words or only in the text; letters and digits must stand in both.

    Raises:
        SkippedError: no text or no words.
        WordsError: a word is not the next of the text, or the text goes on after the last.
    """
    if not row.text.strip():
        raise SkippedError("no text", row.id)
    if not row.words:
        raise SkippedError("no words", row.id)
    places, end = [], 0
    for number, (word, _, _) in enumerate(row.words):
        word = word.strip()
        start = row.text.find(word, end) if word else -1
        if start < 0 or _letters(row.text, end, start):
            raise WordsError(row.id, f"word {number}, {visible(word)!r:.60}, is not next in {row.text[end:]!r:.60}")
        end = start + len(word)
        places.append((start, end))
    if _letters(row.text, end, len(row.text)):
        raise WordsError(row.id, f"after the last word comes {row.text[end:]!r:.60}")
    return places


def _phrases(rows: Sequence[SpeechRow]) -> list[Fragment]:
    return spaced([fragment for row in rows for fragment in phrase_fragments(row)])


def _letters(text: str, start: int, end: int) -> bool:
    return any(character.isalnum() for character in text[start:end])


def _phrase_ends(text: str, pause: float) -> bool:
    return pause >= PAUSE - 1e-9 or _last_mark(text) in PHRASE_ENDS


def _sentence_ends(text: str, pause: float) -> bool:
    return _last_mark(text) in SENTENCE_ENDS


def _places(row: SpeechRow, length: int, ends: Callable[[str, float], bool]) -> list[_Cut]:
    """Every place between two words. `ends(word with its punctuation, pause after it)`: a fragment may end there."""
    cuts = []
    timed = zip(locate(row), row.words or (), strict=True)
    for ((start, end), (_, _, end_s)), ((after, _), (_, start_s, _)) in pairwise(timed):
        place = end + _kept(row.text[end:after])
        code = min(math.floor(CODE_RATE * (end_s + start_s) / 2 + 0.5), length)
        cuts.append(_Cut(place, code, ends(row.text[start:place], start_s - end_s)))
    return cuts


def _kept(gap: str) -> int:
    """How much of what stands between two words belongs to the first: its punctuation, then quotes that it closes."""
    kept = max((i + 1 for i, character in enumerate(gap) if character in PHRASE_ENDS), default=0)
    while kept < len(gap) and _closes(gap[kept]):
        kept += 1
    return kept


def _closes(character: str) -> bool:
    return unicodedata.category(character) in ("Pe", "Pf", "Po")


def _last_mark(text: str) -> str:
    """The last character, quotes and brackets around it left out."""
    end = len(text)
    while end and text[end - 1] not in PHRASE_ENDS and (text[end - 1].isspace() or _closes(text[end - 1])):
        end -= 1
    return text[end - 1 : end]


def _split(cuts: Sequence[_Cut], length: int, least: int, most: int, strict: bool = False) -> list[_Cut]:
    """The cuts that are made: at an end of `least` codes or more, or where the next place is over `most`.

    No fragment is without codes. A rest under `least` joins the one before, if `strict` only within `most`.
    """
    made: list[_Cut] = []
    start = 0
    for i, cut in enumerate(cuts):
        following = cuts[i + 1].code if i + 1 < len(cuts) else length
        forced = following - start > most
        if start < cut.code < length and (forced or (cut.ends and cut.code - start >= least)):
            made.append(cut)
            start = cut.code
    if made and length - start < least:
        before = made[-2].code if len(made) > 1 else 0
        if not strict or length - before <= most:
            made.pop()
    return made


def _fragments(row: SpeechRow, length: int, cuts: Sequence[_Cut]) -> list[Fragment]:
    texts = [0, *(cut.text for cut in cuts), len(row.text)]
    codes = [0, *(cut.code for cut in cuts), length]
    spans = zip(texts[:-1], texts[1:], codes[:-1], codes[1:], strict=True)
    return [_fragment(row, (start, end), (a, b)) for start, end, a, b in spans]


def _fragment(row: SpeechRow, text: tuple[int, int], codes: tuple[int, int]) -> Fragment:
    if not row.text.strip():
        raise SkippedError("no text", row.id)
    if codes[1] <= codes[0]:
        raise SkippedError("no codes", row.id)
    part = None if row.codes is None else row.codes[slice(*codes)]
    return Fragment(row.text[slice(*text)], *codes, row.id, part)


def _parted(before: str, after: str) -> bool:
    """Whether a space is missing between two texts; Chinese, Japanese and Thai have none."""
    edges = before[-1:] + after[:1]
    return not any(character.isspace() or _unspaced(character) for character in edges)


def _unspaced(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF" and not "\uac00" <= character <= "\ud7a3"
