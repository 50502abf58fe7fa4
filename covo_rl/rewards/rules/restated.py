"""`The dog barks three times.` -> `three`: an answer without the words of the question, and those of any sentence.

Words are taken from both ends only, never a number, a word that an option holds, or one that denies, compares or joins;
where the question denies or compares, its own words say nothing that could be left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from functools import lru_cache

from covo_rl.rewards.rules.numbers import UNIT_NAMES, UNITS

MAX_WORDS = 60
_FRAME = frozenset(
    "the a an it its it's is are was were be been being this that that's there there's they they're these those "
    "i'd my answer so therefore thus about approximately around roughly in on at of from by to as for with "
    "exactly total one's correct right final likely probably clearly".split()
)
_HEARD = frozenset(
    "i we you he he's she she's can hear heard hears hearing sound sounds sounded sounding seem seems appear appears "
    "like me think believe would say identified detected perceived conveyed expressed has have had does do did "
    "feature features featured contain contains speak speaks speaking spoken speaker speaker's speakers people person "
    "voice play plays playing played sing sings singing come comes happen happens occur occurs lasts long made makes "
    "produced move moves leave leaves background audio clip recording track song music piece noise animal instrument "
    "instruments singer emotion mood tone genre style tempo language accent dialect event source scene gender age "
    "interval chord note key rating meter time signature word phrase statement level pitch frequency price cost costs "
    "main lead number count format total year duration".split()
)
#: words that change what stands beside them, also where the question holds them
_TURNS = frozenset(
    "not no nor never none neither either or and but than without except besides before after until since more less "
    "least fewer over under above below between almost nearly half double twice both all any only unlike other "
    "instead rather opposite wrong false incorrect absent missing if unless while versus vs compare compared same "
    "different plus minus negative too hardly barely".split()
)
_DENIED = re.compile(r"\b(?:not|no|never|except|without|than|compared?|versus)\b|n't\b", re.IGNORECASE)
_ENDING = re.compile(r"(?<=\w{3})(?:'s|ings?|ed|ers?|es|e|s)$")
#: of these, what may stand behind the answer as it does in the question
_RELATE = frozenset("between before after different same while missing absent wrong incorrect".split())
_LABEL = re.compile(r"\([A-Za-z]\)|[A-Za-z][.):]")
_AGE = re.compile(r"^(?!.*(?:month|week|day)).*\b(?:old|age)\b", re.IGNORECASE)
_AROUND = " ,.:;!?\"'*="
_NOT = re.compile(r"not|\w+n't|cannot", re.IGNORECASE)
_SAYS = {"yes": False, "no": True}


@lru_cache(maxsize=4096)
def _question_stems(question: str) -> frozenset[str]:
    words = (word.strip(_AROUND + "()").lower() for word in question.split())
    return frozenset(_ENDING.sub("", word) for word in words if word not in _TURNS)


def restated(text: str, question: str, own: Set[str]) -> str:
    """The core of a cleaned text; `own` are the words that options hold.

    >>> restated("The dog barks three times.", "How often does the dog bark?", {"three"})
    'three times'
    """
    words = text.split()
    if not 1 < len(words) <= MAX_WORDS:
        return text
    allowed = _FRAME
    stems: Set[str] = frozenset()
    if not _DENIED.search(question):
        allowed, stems = _FRAME | _HEARD, _question_stems(question)
        if _AGE.search(question):
            stems = stems | {"year", "old"}

    if _LABEL.fullmatch(words[0]):  # B. It is a cat
        return f"{words[0]} {restated(' '.join(words[1:]), question, own)}"
    bare = [word.strip(_AROUND).lower() for word in words]
    asked = {word.strip(_AROUND) for word in question.lower().split()}
    empty = [
        word not in own
        and word not in _TURNS
        and word.replace("'", "").isalpha()
        and (word in allowed or _ENDING.sub("", word) in stems)
        and (word != "a" or (i > 0 and words[i] == "a"))  # A is a label, or a note
        for i, word in enumerate(bare)
    ]
    first = bare[0]
    if first in _SAYS and first in own:
        denials = [bool(_NOT.fullmatch(word)) for word in bare]
        if all(
            one or word in asked or word == "-" or no
            for one, word, no in zip(empty[1:], bare[1:], denials[1:], strict=True)
        ):
            return first if any(denials) == _SAYS[first] else text
    solid = [i for i, one in enumerate(empty) if not one]
    last = [i for i in solid if bare[i] not in _RELATE & asked]
    return " ".join(words[solid[0] : last[-1] + 1]) if last else text


def own_words_of(texts: Iterable[str]) -> frozenset[str]:
    """Words that `restated` must leave; the names of units are among them where a text has a number with one."""
    words = frozenset(word for text in texts for word in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower()))
    units = frozenset(UNIT_NAMES) | frozenset(UNITS)
    return (words | units if words & units else words) - {"a", "an", "the"}
