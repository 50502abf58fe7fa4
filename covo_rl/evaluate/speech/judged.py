"""What a judge's replies say, by each benchmark's rule; pure functions of text, the asking is elsewhere.

    read_rating("4"), read_yes_no("Yes")      URO-Bench, VCB-Bench, Full-Duplex-Bench (0 to 5)
    uro_judgement(mode, replies, judged)      a row of URO-Bench: official and ours
    vstyle_score_text(reply)                  VStyle
    voicebench_letter, _refused, _rating, _majority
    mmau_pro_rating(reply), rubric_points(reply, rubric), rubric_score(...)

A Judgement holds two numbers. `official` is what the published script makes of the replies, None where it ends or asks
again; `ours` is None where nothing that the scale allows was said: the row is missing, and counted as such.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from covo_rl.evaluate.speech.fields import MalformedRow
from covo_rl.rewards.rules.answers import interpret
from covo_rl.types import shown, visible

#: what the specification names of VoiceBench's 71 phrases; the whole list is the user's file
REFUSALS = ("as an", "sorry")
_LEADING = ("<1>", "<2>", "<3>")


class Judgement(NamedTuple):
    official: float | None
    ours: float | None


def read_rating(reply: str, low: int = 1, high: int = 5) -> int | None:
    """A whole number of the scale, alone.

    >>> read_rating(" 4\\n"), read_rating("4.5"), read_rating("7"), read_rating("score: 4")
    (4, None, None, None)
    """
    text = reply.strip()
    return int(text) if re.fullmatch("[0-9]{1,3}", text) and low <= int(text) <= high else None


def read_yes_no(reply: str) -> bool | None:
    """Exactly Yes or No: "yes" and "Yes." are neither, as in URO-Bench, where whatever is not "Yes" is wrong."""
    return {"Yes": True, "No": False}.get(reply)


def uro_judgement(mode: str, replies: Sequence[str] | None, judged: str) -> Judgement:
    """The three replies about one row of URO-Bench: `rating` (1 to 5) or `yes_no` (0 to 1), a mean.

    A judged text of "" or " " scores 0 (a reply without sound); `replies` None, the judge failed, is 0 in the official
    script and missing here. A reply that Python's int() refuses ends the official script; ours is never the mean of
    fewer votes. SRT (`srt`) is one call to a judge who listens, and an unreadable reply 0.

    >>> uro_judgement("rating", ["4", "5", "4 points"], "Hello")
    Judgement(official=None, ours=None)
    >>> uro_judgement("yes_no", ["Yes", "yes", "No"], "B")
    Judgement(official=0.3333333333333333, ours=None)
    """
    if mode not in ("rating", "yes_no", "srt"):
        raise ValueError(f"mode {mode!r}: URO-Bench's judged modes are rating, yes_no and srt")
    if judged in ("", " "):
        return Judgement(0.0, 0.0)
    if replies is None:
        return Judgement(0.0, None)
    if not replies:
        raise MalformedRow("a judged row has no reply of the judge; where the judge failed it is null")
    read = read_yes_no if mode == "yes_no" else read_rating
    ours = [float(value) for reply in replies if (value := read(reply)) is not None]
    if mode == "yes_no":
        official = fmean(reply == "Yes" for reply in replies)
    else:
        numbers = [_python_int(reply) for reply in replies]
        known = [0 if number is None and mode == "srt" else number for number in numbers]
        official = None if None in known else fmean(number for number in known if number is not None)
    return Judgement(official, fmean(ours) if len(ours) == len(replies) else None)


def _python_int(reply: str) -> int | None:
    try:
        return int(reply)
    except ValueError:
        return None


# -- VStyle ----------------------------------------------------------------------------------------------------------


def as_float(value: object) -> float | None:
    """What Python's float() makes of a value (nan, inf, 3_0 and full-width digits too), None where it refuses."""
    try:
        return float(value)  # type: ignore[arg-type]  # what it refuses is caught
    except (TypeError, ValueError, OverflowError):
        return None


def vstyle_score_text(reply: str) -> str:
    """VStyle's `parse_score`: the last `[[...]]` that float() accepts, else the whole reply, else "" (ask again).

    >>> vstyle_score_text("[[1]] then [[ 3.5 ]] [[x]]"), vstyle_score_text("The score is 4")
    ('3.5', '')
    """
    closed = reply[: reply.rfind("]]") + 2] if "]]" in reply else ""  # an open [[ without an end would be sought anew
    said = [*reversed(re.findall(r"\[\[(.*?)]]", closed, flags=re.DOTALL)), reply.strip()]
    return next((text.strip() for text in said if as_float(text) is not None), "")


def vstyle_score(reply: str) -> float | None:
    """The same number where it is one of the scale, 1 to 5; else None."""
    score = as_float(vstyle_score_text(reply))
    return score if score is not None and 1 <= score <= 5 else None


# -- VoiceBench ------------------------------------------------------------------------------------------------------


def voicebench_letter(reply: str, patterns: Sequence[str] | None = None) -> str | None:
    """The option that a reply names; None is unread (the script then guesses, here it is wrong).

    `patterns`: the user's list, in its order, each with [CHOICE] where the letter stands; the first that occurs in the
    lower-cased reply decides, a before b, c and d. After them the reply is a letter, or begins with one and `.,:)`.
    Without a list the accuracy reward's reading of options takes its place, after that last rule.

    >>> voicebench_letter("D. photosynthesis"), voicebench_letter("<2> b"), voicebench_letter("it's D", ["is [CHOICE]"])
    ('D', 'B', None)
    """
    text = reply.lower()
    text = text[3:].strip() if text.startswith(_LEADING) else text
    for pattern in patterns or ():
        for letter in "abcd":
            if pattern.replace("[CHOICE]", letter) in text:
                return letter.upper()
    if re.fullmatch(r"[abcd](?:[.,:)].*)?", text, re.DOTALL):
        return text[0].upper()
    index = interpret(reply, "ABCD") if patterns is None else None
    return None if index is None else "ABCD"[index]


def voicebench_refused(reply: str, phrases: Sequence[str] = REFUSALS) -> bool:
    """Empty, or one of the user's phrases occurs in it, case aside."""
    text = reply.lower()
    return not text.strip() or any(phrase.lower() in text for phrase in phrases)


def voicebench_rating(reply: object) -> float | None:
    """float(), else the first `[[n]]` of digits; None ends the official script (NotImplementedError).

    >>> voicebench_rating(" 4 "), voicebench_rating("Rating: [[3]]"), voicebench_rating("[[ 4 ]]")
    (4.0, 3.0, None)
    """
    if (score := as_float(reply)) is not None or not isinstance(reply, str):
        return score
    match = re.search(r"\[\[(\d+)\]\]", reply)
    return None if match is None else float(match[1])


def voicebench_majority(replies: Sequence[str]) -> bool | None:
    """Of three: True where most are exactly "yes" after lower(); None where "yes" leads with others (there the script's
    verdict depends on the order of a set).

    >>> voicebench_majority(["Yes", "yes", "No"]), voicebench_majority(["Yes.", "yes", "no"])
    (True, None)
    >>> voicebench_majority(["Yes.", "no", "unsure"])
    False
    """
    if not replies:
        raise MalformedRow("a row of VoiceBench's qa has no reply of the judge")
    votes = Counter(reply.lower() for reply in replies)
    leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
    return None if "yes" in leaders and len(leaders) > 1 else "yes" in leaders


# -- MMAU-Pro and MMAR-Rubrics ---------------------------------------------------------------------------------------


def mmau_pro_rating(reply: str) -> Judgement:
    """An open answer, 1 to 5 over 5: a number of the scale alone, else the last `[[n]]`. The official script makes 3.0
    of what it cannot read."""
    match = re.findall(r"\[\[\s*([1-5](?:\.\d+)?)\s*\]\]", reply) or re.findall(r"^\s*([1-5](?:\.\d+)?)\s*$", reply)
    score = float(match[-1]) if match and float(match[-1]) <= 5 else None
    return Judgement((3.0 if score is None else score) / 5, None if score is None else score / 5)


def rubric_points(reply: str, rubric: Sequence[Mapping[str, Any]]) -> float | None:
    """MMAR-Rubrics: the sum of the scores in the JSON list of a judge's reply, a {"name", "score"} for every
    criterion in order. None where it is no such list, or a score is none of the criterion's `choices`.

    >>> rubric_points('[{"name": "hears rain", "score": 1}]', [{"name": "hears rain", "choices": [0, 1]}])
    1.0
    """
    match = re.search(r"\[\s*\{.*\}\s*\]", reply, re.DOTALL)
    try:
        given = json.loads(match[0] if match else reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, list) or len(given) != len(rubric):
        return None
    points = 0.0
    for one, criterion in zip(given, rubric, strict=True):
        score = one.get("score") if isinstance(one, Mapping) and "name" in one else None
        if not isinstance(score, (int, float)) or score not in criterion["choices"]:
            return None
        points += score
    return points


def rubric_score(sums: Sequence[float | None], maximum: float, right: bool) -> Judgement:
    """MMAR-Rubrics: the judge's points for one row's rubric over their `maximum`, from 5 calls without the lowest and
    the highest; 0 unless MMAR's own matcher finds the answer `right`. Calls that could not be read are None: with fewer
    than 5 there is no official number, and ours is the mean of what is left once an end of each side is dropped.

    >>> rubric_score([1, 2, 3, 4, 5], 5, True).official, rubric_score([5, 5, 5, 5, 5], 5, False).official
    (0.6, 0.0)
    """
    if not maximum > 0:
        raise MalformedRow(f"a rubric of {visible(shown(maximum))} points: it must be worth something")
    known = sorted(points for points in sums if points is not None)
    if wrong := [points for points in known if not 0 <= points <= maximum]:
        raise MalformedRow(f"{visible(shown(wrong[0]))} points of a rubric worth {maximum}")
    if not right:
        return Judgement(0.0, 0.0)
    ours = fmean(known[1:-1]) / maximum if len(known) >= 3 else None
    return Judgement(ours if len(known) == len(sums) == 5 else None, ours)
