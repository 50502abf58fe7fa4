"""The report of a set of speech: report.json, report.md and scores.jsonl; and two of them compared.

write_speech_report(report, records, folder)      a number never appears without what it depends on
compare_speech(a, b)                              B minus A over the same rows of each sub-set
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from covo_rl.data.files import json_line, read_json_lines, read_record, write_atomically, write_json
from covo_rl.data.read import some
from covo_rl.data.terminal import LAYOUT, say
from covo_rl.evaluate.inputs import count_rows
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.speech.groups import caveat
from covo_rl.evaluate.speech.sets import KINDS
from covo_rl.evaluate.summary import paired_bootstrap
from covo_rl.evaluate.tables import provenance_lines, source_lines, table_lines
from covo_rl.records.console import number
from covo_rl.types import visible

#: one line a row: what was heard and judged, and the row's own score
SCORES = "scores.jsonl"


def write_speech_report(
    report: Mapping[str, Any], records: Sequence[Mapping[str, Any]], folder: Path, *, quiet: bool = False
) -> None:
    """Write all three files; print the tables, unless `quiet`."""
    write_atomically(folder / SCORES, lambda file: file.writelines(map(json_line, records)))
    write_json(folder / "report.json", report)
    text = visible(speech_markdown(report), LAYOUT)
    write_atomically(folder / "report.md", lambda file: file.write(text + "\n"))
    if not quiet:
        say(text)
        say(f"report: {folder / 'report.json'}")
    for problem in report["problems"]:
        say(f"note: {problem}", err=True)


def speech_markdown(report: Mapping[str, Any]) -> str:
    """Scores with intervals, means over groups, what has been published beside them, and everything to repeat it."""
    head = ["sub-set", "rows", "missing", "score", "95 %", "official", "answered only", "more", "note"]
    rows = [
        [name, block["n"], block["missing"], number(block["score"]), _span(block), number(_plain(block, "official")),
         number(_plain(block, "answered_only")), _more(block), block.get("absent") or caveat(block)]
        for name, block in report["subsets"].items()
    ]  # fmt: skip
    lines = [f"# {report['title']}", "", *table_lines(head, rows)]
    if groups := report["groups"]:
        rows = [[name, block["sets"], number(block["score"]), _span(block), some(block["missing"], 3)]
                for name, block in groups.items()]  # fmt: skip
        lines += ["## Means", "", *table_lines(["group", "sub-sets", "score", "95 %", "partial, without"], rows)]
    if rows := [row for row in report["published"] if row["ours"] is not None]:
        lines += ["## Beside published scores", "", *published_lines(rows)]
        lines += [*source_lines(report["published_in"]), ""]
    if engines := {name: entry for name, entry in report["engines"].items() if name != "judge_prompts"}:
        rows = [[name, *_engine(entry)] for name, entry in engines.items()]
        lines += ["## Engines", "", *table_lines(["", "engine", "version", "counts"], rows)]
    if rows := list(dict.fromkeys((name, prompt["label"], prompt["sha256"]) for block in report["subsets"].values()
                                  for name, prompt in block.get("judge_prompts", {}).items())):  # fmt: skip
        lines += ["## Wordings of the judge", "", *table_lines(["", "", "sha256"], rows)]
    lines += provenance_lines(report)
    if problems := report["problems"]:
        lines += ["", "## Worth knowing", "", *(f"- {problem}" for problem in problems)]
    return "\n".join([*lines, ""])


def published_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of published scores, ours first; what does not belong beside them stands in a column of its own."""
    models = list(dict.fromkeys(model for row in rows for model in row["published"]))
    cells = []
    for row in rows:
        why, ours = row["not_comparable"], number(row["ours"])
        other = f"{ours} ({why})" if why and row["ours"] is not None else ""
        published = [number(row["published"].get(model)) for model in models]
        cells.append([row["name"], "-" if other else ours, other, *published])
    return table_lines(["", "ours", "ours, not comparable", *models], cells)


def _span(block: Mapping[str, Any]) -> str:
    ends = block.get("ci95")
    return f"{ends[0]:.2f}, {ends[1]:.2f}" if ends else ""


def _plain(block: Mapping[str, Any], name: str) -> float | None:
    value = block.get(name)
    return value if isinstance(value, (int, float)) else None


def _more(block: Mapping[str, Any]) -> str:
    """Figures beside the score."""
    names = ("latency", "frequency", "jsd", "response_latency", "stop_latency", "score_all", "unread", "hallucinated")
    single = [f"{name} {number(value, 3)}" for name in names if (value := _plain(block, name)) is not None]
    blocks = ("utmos", "asr_wer", "relevance", "accuracy", "strict", "from_asr", "neutral_voice")
    inner = [f"{name} {number(block[name]['score'])}" for name in blocks if isinstance(block.get(name), Mapping)]
    return "; ".join([*single, *inner])


def _engine(entry: Mapping[str, Any]) -> list[str]:
    counts = {name: value for name, value in entry.items() if name not in ("engine", "version") and value}
    listed = ", ".join(f"{name} {value}" for name, value in counts.items())
    return [entry["engine"], str(entry.get("version") or "not known")[:12], listed]


# -- comparison ------------------------------------------------------------------------------------------------------


def is_speech_report(folder: Path) -> bool:
    """Whether a folder holds the report of a set of speech."""
    return (folder / SCORES).is_file()


def read_speech_report(folder: Path) -> dict[str, Any]:
    """report.json. Raises EvalInputError: there is none, or it is of another kind."""
    path = folder / "report.json"
    if not path.is_file():
        raise EvalInputError([f"{folder}: no report.json; is this the --output of a finished `covo-rl eval`?"])
    try:
        report = read_record(path)
    except ValueError as error:
        raise EvalInputError([str(error)]) from error
    if absent := [name for name in ("set", "subsets", "groups", "published", "data_sha256") if name not in report]:
        raise EvalInputError([f"{path} has no {', '.join(absent)}: it is no report of a set of speech"])
    blocks = report["subsets"] if isinstance(report["subsets"], dict) else {"": report["subsets"]}
    if odd := [name for name, block in blocks.items() if not isinstance(block, dict) or block.get("kind") not in KINDS]:
        raise EvalInputError([f"{path}: subsets: {some(odd)} has no kind that this version of covo-rl knows"])
    return report


def compare_speech(a: Path, b: Path) -> dict[str, Any]:
    """B minus A, per sub-set that both have scored: the mean difference of the rows' own scores with its paired
    bootstrap interval. Where a score is no mean of rows (corpus rates, BLEU), that is said.

    Raises:
        EvalInputError: not two finished evaluations of one set over the same data, or other rows.
    """
    reports = [read_speech_report(folder) for folder in (a, b)]
    problems = [
        f"{name} differs: {a} has {reports[0][name]}, {b} has {reports[1][name]}"
        for name in ("set", "data_sha256") if reports[0][name] != reports[1][name]
    ]  # fmt: skip
    asked = [", ".join(report.get("subsets_asked") or ("all",)) for report in reports]
    if problems and asked[0] != asked[1]:
        problems.append(
            f"--subset differs: {a} has {asked[0]}, {b} has {asked[1]}; compare evaluations of the same parts"
        )
    scores = [_row_scores(folder) for folder in (a, b)] if not problems else [{}, {}]
    for name, here, there in ((a, *scores), (b, *reversed(scores))):
        if extra := [row for row in here if row not in there]:
            problems.append(f"only {name} has {count_rows(extra)}")
    if problems:
        raise EvalInputError(problems)
    subsets = {}
    for name in reports[0]["subsets"]:
        pairs = [(x, y) for row, (subset, x) in scores[0].items()
                 if subset == name and x is not None and (y := scores[1][row][1]) is not None]  # fmt: skip
        if pairs:
            a_N, b_N = ([pair[side] for pair in pairs] for side in (0, 1))
            whole = [report["subsets"][name]["score"] for report in reports]
            subsets[name] = {
                "a": whole[0], "b": whole[1], "n": len(pairs), "mean": fmean(b_N) - fmean(a_N),
                "ci95": list(paired_bootstrap(a_N, b_N)),
                "of_rows": all(abs(fmean(own) - score) < 1e-6 for own, score in zip((a_N, b_N), whole, strict=True)),
            }  # fmt: skip
    engines = [report["engines"] for report in reports]
    specs = [{name: entry.get("engine") for name, entry in own.items() if name != "judge_prompts"} for own in engines]
    return {"a": str(a), "b": str(b), "set": reports[0]["set"], "subsets": subsets,
            "differs_also_in": {"engines": specs} if specs[0] != specs[1] else {}}  # fmt: skip


def _row_scores(folder: Path) -> dict[str, tuple[str, float | None]]:
    return {row["id"]: (row["subset"], row["score"]) for row in read_json_lines(folder / SCORES)}


def speech_comparison_markdown(result: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table."""
    rows = [
        [name, d["n"], number(d["a"]), number(d["b"]), f"{d['mean']:+.2f} [{d['ci95'][0]:+.2f}, {d['ci95'][1]:+.2f}]",
         "" if d["of_rows"] else "of row scores: the set's own is no mean of them, or rows are missing"]
        for name, d in result["subsets"].items()
    ]  # fmt: skip
    lines = [f"A: {result['a']}", "", f"B: {result['b']}", ""]
    lines += table_lines([result["set"], "rows of both", "A", "B", "B - A [95 %]", "note"], rows)
    lines += [f"The two also differ in {what}: A {one}, B {two}." for what, (one, two) in
              result["differs_also_in"].items()]  # fmt: skip
    return "\n".join(lines)
