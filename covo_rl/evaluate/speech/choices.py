"""AIR-Bench (arXiv 2402.07729), by its scripts score_foundation.py and cal_score.py (OFA-Sys/AIR-Bench @9832476).

    air_choice(row)            foundation: right, wrong, or None where no letter is read
    air_foundation(rows)       {task_dataset: {n, correct}}, and what was not read
    air_chat(rows, swapped)    chat: win rates and means of the judge's two numbers
    air_chat_both(...)         both orders of the answers averaged, as the paper reports

A file on which a script ends has no official number: OfficialStop says where, and `strict=False` scores the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from covo_rl.evaluate.sets import leading_letter
from covo_rl.evaluate.speech.fields import MalformedRow, field
from covo_rl.types import shown, visible

CHAT_TASKS = {
    "speech_QA": "speech", "speech_dialogue_QA": "speech", "sound_QA": "sound", "sound_generation_QA": "sound",
    "music_QA": "music", "music_generation_analysis_QA": "music", "speech_and_sound_QA": "speech_and_sound",
    "speech_and_music_QA": "speech_and_music",
}  # fmt: skip
CHAT_GROUPS = ("speech", "sound", "music", "speech_and_sound", "speech_and_music")


class OfficialStop(Exception):
    """The official script ends here: `exit 1`, or the name of an exception."""


def air_choice(row: Mapping[str, Any]) -> bool | None:
    """The rule of MMSU, but that an empty reply and the word None are dropped too, that of options with equal text only
    the first is right, and that a letter beyond the options is wrong.

    >>> air_choice({"choice_a": "cat", "choice_b": "cat", "answer_gt": "cat", "response": "B"})
    False

    Raises:
        OfficialStop: the response is no text; or, told only where a letter was read, the key is not among the options,
            or choice_a or choice_b is not there and none before it is the key.
        MalformedRow: no response, or no key.
    """
    text = _text(row, "response").strip().replace("\n", "")
    letter = None if text in ("", "None") else leading_letter(text)
    if letter is None:
        return None
    key = field(row, "answer_gt", object)
    for place, name in enumerate(("choice_a", "choice_b", "choice_c", "choice_d")):
        if place < 2 and name not in row:
            raise OfficialStop("KeyError")
        if row.get(name) == key:
            return place == letter
    raise OfficialStop("exit 1")


def _text(row: Mapping[str, Any], name: str) -> str:
    """What the scripts strip; anything else but text ends them there."""
    if name in row and not isinstance(row[name], str):
        raise OfficialStop("AttributeError")
    return field(row, name, str)


def air_foundation(rows: Sequence[Mapping[str, Any]], *, strict: bool = True) -> dict[str, Any]:
    """`tasks`: {n, correct} of every task_name + "_" + dataset_name, in the order of the rows; `fail_num`: rows that
    were not read. Rows whose task_name is null are passed over. Not `strict`: rows that end the script are counted as
    `bad_rows`, and groups with nothing read have n = 0.

    Raises:
        OfficialStop: a response that is no text, a key not among the options, or a group of which nothing was read.
    """
    tasks: dict[str, dict[str, int]] = {}
    failed = bad_rows = 0
    for row in rows:
        if row.get("task_name", "") is None:
            continue
        group = tasks.setdefault(f"{field(row, 'task_name', str)}_{field(row, 'dataset_name', str)}",
                                 {"n": 0, "correct": 0})  # fmt: skip
        try:
            verdict = air_choice(row)
        except OfficialStop:
            if strict:
                raise
            bad_rows += 1
            continue
        failed += verdict is None
        group["n"] += verdict is not None
        group["correct"] += bool(verdict)
    if strict and not all(group["n"] for group in tasks.values()):
        raise OfficialStop("KeyError")
    return {"tasks": tasks, "fail_num": failed} | ({} if strict else {"bad_rows": bad_rows})


def air_pair(reply: str) -> tuple[int, int] | None:
    """The judge's two numbers, `first second` with one space, at most 10 each; None where they cannot be read.

    >>> air_pair(" 8 7\\n"), air_pair("8  7"), air_pair("8, 7"), air_pair("11 7")
    ((8, 7), None, None, None)
    """
    parts = reply.strip().replace("\n", "").split(" ")
    try:
        first, second = map(int, parts)
    except ValueError:
        return None
    return None if max(first, second) > 10 else (first, second)


def air_chat(rows: Sequence[Mapping[str, Any]], *, swapped: bool, strict: bool = True) -> dict[str, Any]:
    """`tasks`: {n, win_rate, first_mean, second_mean} of the five groups; a win is the second number above the first,
    in a `swapped` file the first above the second. `success_num` counts what splits in two, numbers or not.

    Raises:
        OfficialStop: a judge's reply that is no text, or a group without a score (strict).
        MalformedRow: a task that AIR-Bench does not have, or a row without the judge's reply.
    """
    pairs: dict[str, list[tuple[int, int]]] = {group: [] for group in CHAT_GROUPS}
    failed = split = 0
    for row in rows:
        name, reply = field(row, "task_name", str), _text(row, "gpt-score") if strict else field(row, "gpt-score", str)
        if name not in CHAT_TASKS:
            raise MalformedRow(f"task_name {visible(shown(name))}; AIR-Bench chat has {', '.join(CHAT_TASKS)}")
        pair = air_pair(reply)
        split += len(reply.strip().replace("\n", "").split(" ")) == 2
        if pair is None:
            failed += 1
        else:
            pairs[CHAT_TASKS[name]].append(pair)
    if strict and not all(pairs.values()):
        raise OfficialStop("ZeroDivisionError")
    tasks = {group: _chat_block(pairs[group], swapped) for group in CHAT_GROUPS if pairs[group]}
    return {"tasks": tasks, "fail_num": failed, "success_num": split}


def _chat_block(pairs: Sequence[tuple[int, int]], swapped: bool) -> dict[str, float]:
    first, second = zip(*pairs, strict=True)
    wins = sum(a > b if swapped else b > a for a, b in pairs)
    return {"n": len(pairs), "win_rate": wins / len(pairs), "first_mean": fmean(first), "second_mean": fmean(second)}


def air_chat_both(plain: Mapping[str, Any], swapped: Mapping[str, Any]) -> dict[str, float]:
    """The model's mean over both orders for each group (second in the plain file, first in the swapped one), `mixed`,
    the mean of the two mixed groups, and `average` of speech, sound, music and mixed. Groups without scores are left
    out, and what rests on them."""
    means = {
        group: (plain["tasks"][group]["second_mean"] + swapped["tasks"][group]["first_mean"]) / 2
        for group in CHAT_GROUPS
        if group in plain["tasks"] and group in swapped["tasks"]
    }
    if {"speech_and_sound", "speech_and_music"} <= means.keys():
        means["mixed"] = (means["speech_and_sound"] + means["speech_and_music"]) / 2
    if {"speech", "sound", "music", "mixed"} <= means.keys():
        means["average"] = fmean(means[group] for group in ("speech", "sound", "music", "mixed"))
    return means
