"""Which option does a text name: by its text, its letter, or both, which must agree.

Texts are compared from strict to loose, so that options that differ only in case, article or sign stay different.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from covo_rl.prompt import option_letter
from covo_rl.rewards.rules.normalize import key, loose_key, merged_key, plain_key
from covo_rl.rewards.rules.quantities import quantity
from covo_rl.rewards.rules.text import clean_text


def _literal(text: str) -> str:
    """The text in its own case, without quotes and full stops around it."""
    text = clean_text(text)
    return text.strip(" .,;\"'") or text


def _squashed(text: str) -> str:
    """`hiphop` is `Hip hop`; numbers stay apart."""
    words = merged_key(text)
    return "".join(words) if all(word.isalpha() and len(word) > 1 for word in words) else " ".join(words)


_LEVELS = (_literal, key, loose_key, plain_key, merged_key, _squashed)  # texts are compared from strict to loose
_LABEL = re.compile(r"[(\[{*'\" ]*([A-Za-z]{1,2})[)\]}*'\" .:,;!?]*")
_MARK = r"[^\w\s+\-$]+\s*|\s+[^\w\s+\-$]+\s*|\s*-\s+|-(?!\d)|\s"  # between a label and its text; no sign
_LABEL_TEXT = re.compile(rf"[(\[{{*'\"]*(?P<label>[A-Za-z]{{1,2}})(?P<mark>{_MARK})(?P<text>\S.*)")
_TEXT_LABEL = re.compile(r"(?P<text>.*\S) ?[(\[](?:option |choice )?(?P<label>[A-Za-z]{1,2})[)\]]\.?")
_TEXT_MARK_LABEL = re.compile(r"(?P<text>.*\w)\s*[-/,;:|]\s+(?:option |choice )?(?P<label>[A-Za-z]{1,2})\W*")
_OWN_LABEL = re.compile(r"\s*[(\[]?([A-Za-z]{1,2}|\d{1,2})(?:[)\]]\s*|[.:]\s+)(\S.*)", re.DOTALL)
_REASON = re.compile(r"[,;.]? (?:because|since|as|due to|given)\b| - (?=\w+ \w+ \w)")
_DENIAL = re.compile(r"\b(?:not|no|rather than|unlike|instead of)\b", re.IGNORECASE)
_REMARK = re.compile(r"(?P<head>.*[^(\s]) ?\((?P<remark>[^()]{3,100})\)\.?")
_CONTRASTS = [
    re.compile(r"not (?P<no>[^,]+),? but (?P<yes>.+)", re.IGNORECASE),
    re.compile(r"(?P<yes>[^,]+),? (?:and not|not|rather than|instead of) (?P<no>[^,]+)", re.IGNORECASE),
]
_NTH = re.compile(r"(?:the )?(\w+) (?:one|option|choice)\W*", re.IGNORECASE)
#: other words for what an option says, where no option says them
_SYNONYMS = {
    **dict.fromkeys(("y", "yeah", "yep", "affirmative"), ("yes",)), **dict.fromkeys(("n", "nope", "negative"), ("no",)),
    "t": ("true",), "f": ("false", "female"), "man": ("male",), "woman": ("female",), "male": ("man",),
    "female": ("woman",), "anger": ("angry",), "sadness": ("sad",), "happiness": ("happy",), "joy": ("happy",),
    "fear": ("fearful",), "disgust": ("disgusted",), "surprise": ("surprised",), "excitement": ("excited",),
    "boredom": ("bored",), "frustration": ("frustrated",), "sarcasm": ("sarcastic",),
}  # fmt: skip
_WRONG = re.compile(r"\b(?:not|no|wrong|incorrect|false|maybe|perhaps)\b|\w+n't\b", re.IGNORECASE)


@dataclass(frozen=True)
class ChoiceIndex:
    """The options of one row, prepared. `classes[i]` is the first index with the same text: duplicates are one."""

    texts: tuple[str, ...]
    classes: tuple[int, ...]
    by_text: dict[Any, set[int]]
    by_letter: dict[str, int]

    def named(self, text: str, strict: bool = False) -> set[int]:
        """Classes of this text at the strictest level that knows it, else of this number; `strict`: articles count."""
        for level in _LEVELS[: 2 if strict else None]:
            if classes := self.by_text.get((level, level(text))):
                return classes
        if strict:
            return set()
        names = [(loose_key, (name,)) for name in _SYNONYMS.get(" ".join(loose_key(text)), ())]
        return set().union(*(self.by_text.get(name, ()) for name in names)) or self._numbered(text)

    def _numbered(self, text: str) -> set[int]:
        """Of this quantity, where all options are quantities; of this number, where all options hold one number."""
        claim = quantity(text)
        if not claim:
            return set()
        quantities = [item for item in map(quantity, self.texts) if item]
        if len(quantities) == len(self.texts):
            bare = claim.number if not claim.unit else None
            pairs = zip(self.classes, quantities, strict=True)
            return {i for i, q in pairs if q[:2] == claim[:2] or (bare is not None and q.number == bare)}
        numbers = [[word for word in loose_key(option) if word[:1].isdigit()] for option in self.texts]
        if claim.unit or any(len(words) != 1 for words in numbers):
            return set()
        return {i for i, words in zip(self.classes, numbers, strict=True) if loose_key(text) == tuple(words)}

    def labelled(self, letter: str) -> set[int]:
        """The class of the option with this label, if there is one."""
        return {self.by_letter[letter.upper()]} if letter.upper() in self.by_letter else set()


@lru_cache(maxsize=4096)
def prepare(choices: tuple[str, ...]) -> ChoiceIndex:
    """Index the options of a row."""
    keys = [key(choice) for choice in choices]
    classes = [
        next(j for j in range(i + 1) if keys[j] == keys[i] and not _case_tells_apart(choices[j], choices[i]))
        for i in range(len(choices))
    ]
    by_letter = {option_letter(i): group for i, group in enumerate(classes)}
    texts = [*zip(choices, classes, strict=True)]
    labels = [label for label in map(_OWN_LABEL.fullmatch, choices) if label]
    if len(labels) == len({label[1].upper() for label in labels}) == len(choices):
        # `B) cat`, `2. cat`: options that carry their own labels are known without them too, and by a number
        texts += [(label[2], group) for label, group in zip(labels, classes, strict=True)]
        texts += [(label[1], group) for label, group in zip(labels, classes, strict=True) if label[1].isdigit()]
    heads = [remark["head"] if (remark := _REMARK.fullmatch(choice)) else choice for choice in choices]
    if len({loose_key(head) for head in heads}) == len(choices):  # Elderly (60+)
        texts += [pair for pair in zip(heads, classes, strict=True) if pair[0] not in choices]
    by_text: dict[Any, set[int]] = {}
    for text, group in texts:
        for level in _LEVELS:
            by_text.setdefault((level, level(text)), set()).add(group)
    return ChoiceIndex(choices, tuple(classes), by_text, by_letter)


def _case_tells_apart(a: str, b: str) -> bool:
    """Cm7 and CM7, Mb and MB, PREsent and preSENT are different; Dog, DOG and dog are not."""
    if a.casefold() == b.casefold() and any(_is_stressed(text) for text in (a, b)):
        return a != b
    return any(
        x != y and x.casefold() == y.casefold() and not (x.isalpha() and len(x) >= 3)
        for x, y in zip(clean_text(a).split(), clean_text(b).split(), strict=False)
    )


def _is_stressed(text: str) -> bool:
    """Capitals set off a word or a syllable."""
    return text not in (text.lower(), text.upper(), text.title(), text.capitalize())


def readings(options: ChoiceIndex, text: str, how: str = "") -> set[int]:
    """Classes that a text names as a whole, by letter, or by both; more than one if it contradicts itself.

    `how`: what the layers around it allow (frames.py).
    """
    label, label_text = _LABEL.fullmatch(text), _LABEL_TEXT.fullmatch(text)
    # "(A) cat" and "the answer is A cat" are a label and a text, not an article and a text
    marked = label_text and (label_text["mark"].strip() or (how in ("label", "lead") and label_text["label"] == "A"))
    strict = bool(label_text and marked and options.labelled(label_text["label"]))
    whole = options.named(text, strict)
    if how == "name":
        return whole
    if label and (not whole or how == "label" or text.rstrip(".").strip("*'\"") != label[1]):
        return whole | options.labelled(label[1])  # "(A)", "option A" where an option is called A: a label too
    for both in () if whole else (label_text, _TEXT_LABEL.fullmatch(text), _TEXT_MARK_LABEL.fullmatch(text)):
        if both and (by_text := options.named(both["text"])) and (by_letter := options.labelled(both["label"])):
            return by_text | by_letter
    return whole


def side_readings(options: ChoiceIndex, text: str, how: str = "") -> set[int]:
    """Classes of a text that says more: `B, because ...`, `a dog, not a cat`, `the second one`."""
    if (reason := _REASON.search(text)) and (classes := readings(options, text[: reason.start()], how)):
        said, *denied = _DENIAL.split(text[reason.end() :], maxsplit=1)
        contradicts = classes & _mentioned(options, " ".join(denied)) or (denied and " - " in reason[0])
        return classes | _mentioned(options, said) | ({-1} if contradicts else set())
    remark = _REMARK.fullmatch(text)
    if remark and (both := _LABEL_TEXT.fullmatch(remark["head"])) and options.named(both["text"]):
        if _WRONG.search(remark["remark"]):
            return set()
        return readings(options, remark["head"], how) | _mentioned(options, remark["remark"])
    for contrast in _CONTRASTS:
        if said := contrast.fullmatch(text.rstrip(" .!")):
            yes, no = readings(options, said["yes"], how), readings(options, said["no"])
            return yes if len(yes) == len(no) == 1 and yes != no else set()
    words = [word for option in options.texts for word in key(option)]
    if (nth := _NTH.fullmatch(text)) and not any(word[:1].isdigit() or word == "last" for word in words):
        rank = re.fullmatch(r"(\d+)(?:st|nd|rd|th)", " ".join(key(nth[1])))
        if rank and 1 <= int(rank[1]) <= len(options.texts):
            return {options.classes[int(rank[1]) - 1]}
    return set()


def _mentioned(options: ChoiceIndex, text: str) -> set[int]:
    """Classes whose text or capital label occurs in a text."""
    said = f" {' '.join(loose_key(text))} "
    names = [(words, group) for (level, words), group in options.by_text.items() if level is loose_key]
    classes = {i for words, group in names if f" {' '.join(words)} " in said for i in group}
    return classes.union(*(options.labelled(letter) for letter in re.findall(r"\b(?!I\b)[A-Z]\b", text)))
