"""Blocks of sub-sets -> the means that a benchmark reports over several, and what has been published beside them.

group_figures(speech_set, blocks, records)       group -> {score, ci95?, sets, partial, missing}
published_figures(speech_set, blocks, groups)    [{name, ours, published: {model: score}}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any

from covo_rl.evaluate.speech.aggregate import URO_GROUPS, URO_SETS, VSTYLE, group_blocks, uro_conclusion
from covo_rl.evaluate.speech.sets import KINDS, SpeechSet, Subset
from covo_rl.evaluate.speech.tasks import score_set

Blocks = Mapping[str, Mapping[str, Any]]
Z95 = 1.959963984540054


def group_figures(
    speech_set: SpeechSet, subsets: Mapping[str, Subset], blocks: Blocks, records: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, Any]]:
    """The official means. `records` are those of scores.jsonl, by sub-set; `partial` where a part is missing."""
    declared = {**{subset.name: subset for subset in speech_set.subsets}, **subsets}
    if speech_set.name == "vstyle":
        return _vstyle(declared, records)
    scores = {name: block["score"] for name, block in blocks.items() if block["score"] is not None}
    if speech_set.name == "uro-bench":
        groups = group_blocks(scores, URO_SETS, URO_GROUPS)
        return _with_intervals(groups, URO_SETS, URO_GROUPS, records, scores)
    used = {name: subset for name, subset in declared.items() if not speech_set.open_parts or name in blocks}
    places = {name: subset.groups for name, subset in used.items()}
    wanted = {group: (group,) for groups in places.values() for group in groups}
    groups = group_blocks(scores, places, wanted)
    groups.pop("overall", None)
    groups = _with_intervals(groups, places, wanted, records, scores)
    if speech_set.name == "mmau-pro" and scores:
        groups["overall"] = _over_rows(blocks)
    return groups


def _with_intervals(
    groups: dict[str, dict[str, Any]], places: Mapping[str, Sequence[str]], wanted: Mapping[str, Sequence[str]],
    records: Mapping[str, Sequence[Any]], scores: Mapping[str, float],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """`of`: the sub-sets of each. `ci95` of a mean of means over independent sub-sets, from the spread of rows within
    each (normal approximation); none where a sub-set has one row, or a score that is no mean of rows."""
    for group, block in groups.items():
        names = [name for name, place in places.items()
                 if name in scores and set(place).issuperset(filter(None, wanted.get(group, ())))]  # fmt: skip
        block["of"] = names
        rows = [[r["score"] for r in records.get(name, ()) if r["score"] is not None] for name in names]
        means = [len(own) > 1 and abs(fmean(own) - scores[name]) < 1e-6 for name, own in zip(names, rows, strict=True)]
        if names and all(means):
            half = Z95 * sum(variance(own) / len(own) for own in rows) ** 0.5 / len(names)
            lowest, highest = (fmean(end(own) for own in rows) for end in (min, max))  # where no draw of rows leads out
            block["ci95"] = [max(block["score"] - half, lowest), min(block["score"] + half, highest)]
    return groups


def _vstyle(subsets: Mapping[str, Subset], records: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """A language's weighted mean, and the mean of each of its categories, out of 5."""
    groups: dict[str, dict[str, Any]] = {}
    for language in dict.fromkeys(subset.language for subset in subsets.values()):
        rows, there = [], set()
        for name, own in records.items():
            if subsets[name].language == language:
                ability = name.removeprefix(f"{language}/")
                rows += [{"ability": ability, "judgement": r["judgements"][0][-1] if _is_judged(r) else None}
                         for r in own]  # fmt: skip
                there |= {ability for r in own if r["score"] is not None}
        if not there:
            continue
        block = score_set("style", rows)
        for category in ("", *VSTYLE):
            wanted = [f"{c}/{name}" for c in VSTYLE if category in ("", c) for name in VSTYLE[c].split()]
            missing = [ability for ability in wanted if ability not in there]
            found = block["groups"]["major"].get(category, {}).get("mean")
            score = block["score"] if not category else None if found is None else float(found)
            if score is not None:
                groups[f"{language}/{category}".rstrip("/")] = {
                    "score": score, "sets": len(wanted) - len(missing), "partial": bool(missing), "missing": missing,
                    "of": [f"{language}/{ability}" for ability in wanted if ability in there],
                }  # fmt: skip
    return groups


def _is_judged(record: Mapping[str, Any]) -> bool:
    return bool(record["judgements"] and record["judgements"][0])


def _over_rows(blocks: Blocks) -> dict[str, Any]:
    """The mean over rows: each sub-set counts as much as it has rows."""
    there = {name: block for name, block in blocks.items() if block["score"] is not None}
    total = sum(block["n"] for block in there.values())
    missing = [name for name in blocks if name not in there]
    score = sum(block["score"] * block["n"] for block in there.values()) / total
    return {"score": score, "sets": len(there), "partial": bool(missing), "missing": missing}


def uro_figures(blocks: Blocks) -> dict[str, float]:
    """Every mean of URO-Bench's own script, UTMOS and error rates with them."""
    scores = {name: {"final_score": block["score"]} for name, block in blocks.items() if block["score"] is not None}
    more = {
        figure: {name: block[figure]["score"] for name, block in blocks.items()
                 if figure in block and block[figure]["score"] is not None}
        for figure in ("utmos", "asr_wer")
    }  # fmt: skip
    wer = {name: rate / 100 for name, rate in more["asr_wer"].items()}
    return uro_conclusion(scores, more["utmos"], wer)


def published_figures(speech_set: SpeechSet, blocks: Blocks, groups: Blocks) -> list[dict[str, Any]]:
    """Rows of a table: what has been published, and ours where there is one: of a sub-set, then of groups. A number
    that rests on a judge's wording of ours, or on a rule that was not verified, says so in `not_comparable`."""
    rows = []
    declared = {subset.name: subset for subset in speech_set.subsets}
    for subset in declared.values():
        if subset.published:
            block = blocks.get(subset.name, {})
            rows.append({
                "name": subset.name, "ours": block.get("score"), "n": block.get("n"),
                "not_comparable": _aside(block, subset),
                "published": dict(subset.published),
            })  # fmt: skip
    for name, by_model in speech_set.published.items():
        group = groups.get(speech_set.figure_groups.get(name, name), {})
        parts = [_aside(blocks.get(part, {}), declared.get(part)) for part in group.get("of", blocks)]
        why = "partial" if group.get("partial") else next((part for part in parts if part and group), "")
        rows.append({"name": name, "ours": group.get("score"), "n": None, "not_comparable": why,
                     "published": dict(by_model)})  # fmt: skip
    return rows


def _aside(block: Mapping[str, Any], subset: Subset | None) -> str:
    n, rows = block.get("n"), subset and subset.rows
    return caveat(block) or (f"{n} of {rows} rows" if n is not None and rows not in (None, n) else "")


def caveat(block: Mapping[str, Any]) -> str:
    """Why a score does not belong beside published ones; "" where nothing is known against it."""
    if not block or block.get("score") is None:
        return ""
    if block.get("missing") and block["missing"] == block["n"]:
        return "every row is missing"
    kind = KINDS[block["kind"]]
    labels = {prompt["label"] for prompt in block.get("judge_prompts", {}).values()}
    if "official" in block and block["official"] is None:
        return "no official number"
    if foreign := sorted(label for label in labels if not label.startswith("official")):
        return foreign[0]
    if kind.rule == "unverified":
        return "unverified rule"
    if block.get("replies", {}).get("text") and "--transcriber" in kind.needs:
        return "text, not speech"
    if "events" in block.get("from", ()):
        return "by its own turns"
    return block.get("caveat", "")
