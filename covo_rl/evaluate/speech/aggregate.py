"""Scores of rows and of sets -> the numbers of a report: blocks with intervals, URO-Bench's groups, VStyle's weights.

mean_block(judgements)                 score, n, missing, ci95, official and answered_only
group_blocks(scores, URO_SETS)         a mean per group, `partial` where a set of the group is missing
uro_conclusion(last_lines, utmos, wer) every mean of URO-Bench's evaluate.py
vstyle_conclusion(records)             every mean of VStyle's gemini_eval.py, printed as it prints them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import isnan
from statistics import fmean
from typing import Any

from covo_rl.evaluate.speech.fields import MalformedRow, checked, field
from covo_rl.evaluate.speech.judged import Judgement, as_float
from covo_rl.evaluate.speech.wer import repeat_score
from covo_rl.evaluate.summary import bootstrap_ratio, wilson

SKILLS, LEVELS, LANGUAGES = ("understanding", "reasoning", "oral"), ("basic", "pro"), ("en", "zh")
#: skill, level, language -> the sets of URO-Bench
_URO = {
    ("understanding", "basic", "en"): "Repeat Summary GaokaoEval",
    ("reasoning", "basic", "en"): "StoralEval TruthfulEval Gsm8kEval MLC",
    ("oral", "basic", "en"): "AlpacaEval CommonEval WildchatEval",
    ("understanding", "basic", "zh"): "Repeat-zh LCSTS-zh HSK5-zh",
    ("reasoning", "basic", "zh"): "SQuAD-zh APE-zh MLC-zh OpenbookQA-zh",
    ("oral", "basic", "zh"): "AlpacaEval-zh Claude-zh Wildchat-zh",
    ("understanding", "pro", "en"): "UnderEmotion-en CodeSwitching-en Safety-en ClothoEval-en MuChoEval-en",
    ("reasoning", "pro", "en"): "MLCpro-en MtBenchEval-en SpeakerAware-en",
    ("oral", "pro", "en"): "SRT-en GenEmotion-en GenStyle-en Multilingual",
    ("understanding", "pro", "zh"): "UnderEmotion-zh CodeSwitching-zh Safety-zh",
    ("reasoning", "pro", "zh"): "MLCpro-zh SpeakerAware-zh",
    ("oral", "pro", "zh"): "SRT-zh GenEmotion-zh GenStyle-zh",
}
#: set of URO-Bench -> (skill, level, language)
URO_SETS = {name: place for place, names in _URO.items() for name in names.split()}
#: every group that URO-Bench reports: all combinations of the three, and their marginals
URO_GROUPS = {
    "_".join(part for part in place if part): tuple(place)
    for place in product(("", *SKILLS), ("", *LEVELS), ("", *LANGUAGES))
    if any(place)
}
VSTYLE = {
    "acoustic_attributes": "age speed gender emotion pitch volume composite_properties",
    "instruction": "emotion variation style",
    "role_play": "character scenario",
    "empathy": "anger sadness_disappointment anxiety_fear joy_excitement",
}


def mean_block(judgements: Iterable[Judgement], *, scale: float = 1.0, share: bool = False) -> dict[str, Any]:
    """`official` counts a row as its script does, `answered_only` leaves missing rows out; `score` is the official
    number, or the other where the script ends (`official` None, `official_stops` rows). `ci95` is of the score: Wilson
    for a `share` of yes and no, else over draws of rows.

    >>> mean_block([Judgement(5.0, 5.0), Judgement(0.0, None)], scale=20)["score"]
    50.0
    """
    rows = list(judgements)
    ours = [row.ours for row in rows if row.ours is not None]
    official = [row.official for row in rows if row.official is not None]
    stops = len(rows) - len(official)
    used = ours if stops else official
    interval = (wilson(sum(used), len(used)) if share else bootstrap_ratio(used)) if used else None
    return {
        "score": scale * fmean(used) if used else None,
        "ci95": [scale * end for end in interval] if interval else None,
        "n": len(rows), "missing": len(rows) - len(ours),
        "official": None if stops or not rows else scale * fmean(official),
        "answered_only": scale * fmean(ours) if ours else None, "official_stops": stops,
    }  # fmt: skip


def answered_block(values: Sequence[float | None], *, scale: float = 1.0, share: bool = False) -> dict[str, Any]:
    """`mean_block` of rows whose official script leaves missing ones (None) out as well."""
    block = mean_block((Judgement(value, value) for value in values if value is not None), scale=scale, share=share)
    return {**block, "n": len(values), "missing": sum(value is None for value in values)}


def known_mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is not None; None of nothing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# -- URO-Bench -------------------------------------------------------------------------------------------------------


def group_blocks(
    scores: Mapping[str, float],
    places: Mapping[str, Sequence[str]] = URO_SETS,
    groups: Mapping[str, Sequence[str]] = URO_GROUPS,
) -> dict[str, dict[str, Any]]:
    """Plain means over the sets that are there, of every group that has one; a group lacking a set is `partial`, and
    `missing` names it. `overall` is the group of all sets."""
    blocks, within = {}, {name: frozenset(place) for name, place in places.items()}
    for group, wanted in {**groups, "overall": ()}.items():
        members = [name for name, place in within.items() if place.issuperset(filter(None, wanted))]
        there = [name for name in members if name in scores]
        if there:
            missing = [name for name in members if name not in scores]
            mean = fmean(scores[name] for name in there)
            blocks[group] = {"score": mean, "sets": len(there), "partial": bool(missing), "missing": missing}
    return blocks


def uro_set_score(last_line: Mapping[str, Any]) -> float:
    """Of the last line of a set's result file: for Repeat what ok_rate and WER make, else its final_score."""
    if "ok_rate" in checked(last_line, "a last line", Mapping):
        return repeat_score(field(last_line, "ok_rate", float), field(last_line, "final_WER_for_ok_case", float))
    return field(last_line, "final_score", float)


def uro_conclusion(
    last_lines: Mapping[str, Mapping[str, Any]], utmos: Mapping[str, float], wer: Mapping[str, float]
) -> dict[str, float]:
    """Every mean of URO-Bench's `conclude` (evaluate.py @9e74bc0) over the sets that are there: `set:NAME`, the groups
    of skill, level and language, UTMOS by language and level, WER of English and CER of Chinese sets by level.

    Raises:
        MalformedRow: a set that URO-Bench does not have, or a number that is none.
    """
    if unknown := sorted({*last_lines, *utmos, *wer} - URO_SETS.keys()):
        raise MalformedRow(f"URO-Bench has no set {', '.join(unknown)}; it has {', '.join(URO_SETS)}")
    scores = {name: uro_set_score(last_lines[name]) for name in URO_SETS if name in last_lines}
    means = {f"set:{name}": score for name, score in scores.items()}
    blocks = group_blocks(scores)
    means |= {("final_score" if group == "overall" else group): block["score"] for group, block in blocks.items()}
    for level, language in product(("", *LEVELS), LANGUAGES):
        parts = (("UTMOS_" + language, utmos), ("WER" if language == "en" else "CER", wer))
        for name, values in parts:
            known = [checked(values[key], f"the {name} of {key}", float) for key, place in URO_SETS.items()
                     if key in values and place[2] == language and level in ("", place[1])]  # fmt: skip
            if known:
                means[f"final_{name}" + (f"_{level}" if level else "")] = fmean(known)
    return means


# -- VStyle ----------------------------------------------------------------------------------------------------------


def vstyle_weights() -> dict[str, float]:
    """A quarter for each category: shared equally, but composite_properties has half of its one."""
    weights = {}
    for category, names in VSTYLE.items():
        abilities = [f"{category}/{name}" for name in names.split()]
        composite = f"{category}/composite_properties"
        rest = (0.25 - 0.125) / (len(abilities) - 1) if composite in abilities else 0.25 / len(abilities)
        weights |= {ability: 0.125 if ability == composite else rest for ability in abilities}
    return weights


def vstyle_conclusion(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """model_name -> overall, coverage_percent, major, ability, in the printed digits of VStyle's `analyze_scores`.

    Records without a readable gemini_score leave the means; nan is read, counted in n and left out of the mean; weights
    of abilities without records are shared by the others; unknown abilities weigh nothing.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for record in records:
        score, model = as_float(record.get("gemini_score")), record.get("model_name")
        if score is not None and model is not None:
            scores.setdefault(str(model), {}).setdefault(str(record.get("ability")), []).append(score)
    return {model: _vstyle_model(scores[model]) for model in sorted(scores)}


def _vstyle_model(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    weights = vstyle_weights()
    means = {ability: _mean_of_numbers(scores[ability]) for ability in weights if ability in scores}
    overall, used = _weighted(means, weights)
    report: dict[str, Any] = {"overall": f"{overall:.2f}", "coverage_percent": f"{used:.1%}"[:-1], "major": {}}
    for category in VSTYLE:
        own = {ability: mean for ability, mean in means.items() if ability.startswith(f"{category}/")}
        if own:
            mean, used = _weighted(own, weights)
            report["major"][category] = {
                "mean": f"{mean:.2f}", "n": sum(len(scores[ability]) for ability in own),
                "coverage_percent": f"{used / 0.25:.1%}"[:-1],
            }  # fmt: skip
    report["ability"] = {ability: {"mean": f"{mean:.2f}", "n": len(scores[ability])} for ability, mean in means.items()}
    return report


def _weighted(means: Mapping[str, float], weights: Mapping[str, float]) -> tuple[float, float]:
    """The weighted mean and the weight used, added in the table's order, as the printed digits depend on it."""
    total = used = 0.0
    for ability, mean in means.items():
        total += mean * weights[ability]
        used += weights[ability]
    return total / used if used else float("nan"), used


def _mean_of_numbers(scores: Sequence[float]) -> float:
    """Added with Kahan's compensation, as pandas adds groups whose rows are mixed: how a tie is printed rests on it."""
    known = [score for score in scores if not isnan(score)]
    total = lost = 0.0
    for score in known:
        added = score - lost
        lost = total + added - total - added
        lost = 0.0 if isnan(lost) else lost  # after an infinite score
        total += added
    return total / len(known) if known else float("nan")
