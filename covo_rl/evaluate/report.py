"""Records -> report.json, report.md, plots, MMAU's submission; and two evaluations of the same rows compared.

A number never appears without what it depends on.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from covo_rl.data.files import read_record, write_atomically, write_json
from covo_rl.data.terminal import LAYOUT, say
from covo_rl.evaluate.answer import CONDITIONS
from covo_rl.evaluate.inputs import Inputs, count_rows, read_json_rows
from covo_rl.evaluate.records import Record, RecordLog
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.summary import accuracy_of, compare_pairs, row_score, summarize
from covo_rl.evaluate.tables import provenance_lines, table_lines
from covo_rl.evaluate.turn_figures import turn_figures, turn_lines
from covo_rl.records.console import interval, number, percent
from covo_rl.types import visible

#: verdict -> what a report calls it
RULES = {
    "official": "official rule, raw reply",
    "official_extracted": "official rule, extracted answer",
    "strict": "strict, extracted answer",
    "strict_raw": "strict, raw reply",
}
#: and what two evaluations may have in common beside them: streams
COMPARED = {**RULES, "timing": "right at the right time"}


def write_report(
    inputs: Inputs, by_audio: Mapping[str, Sequence[Record]], settings: Mapping[str, Any], folder: Path, *, plots: bool,
    quiet: bool = False,
) -> None:  # fmt: skip
    """Write report.json, report.md, the plots and the submission; print the tables, unless `quiet`.

    `settings` says what was evaluated on what (hashes, options, problems).
    """
    eval_set = inputs.eval_set
    report = {
        "set": eval_set.name,
        "title": eval_set.title,
        "source": eval_set.source,
        "licence": eval_set.licence,
        "official_rule": eval_set.scorer_rule,
        "official_drops": eval_set.official_drops,
        "expected_rows": eval_set.rows,
        **settings,
        **summarize(by_audio["real"]),
        "audio": _audio_figures(by_audio),
        **({"turn_taking": turns} if (turns := turn_figures(by_audio["real"])) else {}),
    }
    write_json(folder / "report.json", report)
    text = visible(_markdown(report), LAYOUT)
    write_atomically(folder / "report.md", lambda file: file.write(text + "\n"))
    if not quiet:
        say(text)
    if eval_set.submission:
        path = folder / "submission.json"
        write_json(path, _submission(by_audio["real"], read_json_rows(inputs.data)))
        say(f"to submit: {path}")
    if plots and importlib.util.find_spec("matplotlib") is None:
        say("plots need matplotlib: pip install 'covo-rl[plots]' (or --no-plots)", err=True)
    elif plots:
        _draw(report, folder)
    if not quiet:
        say(f"report: {folder / 'report.json'}")
    for warning in settings["problems"]:
        say(f"note: {warning}", err=True)


def _audio_figures(by_audio: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Strict accuracy per audio condition, and real minus each other one with its paired interval."""
    figures: dict[str, Any] = {audio: accuracy_of(records, "strict") for audio, records in by_audio.items()}
    scores = {audio: [row_score(record, "strict") for record in records] for audio, records in by_audio.items()}
    real = scores.pop("real")
    for audio, other in scores.items():
        pairs = [(a, b) for a, b in zip(other, real, strict=True) if a is not None and b is not None]
        if pairs:
            change = compare_pairs(*zip(*pairs, strict=True))
            figures[f"real_minus_{audio}"] = {name: change[name] for name in ("mean", "ci95", "p_value")}
    return figures


def _submission(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """MMAU's submission: the data file's rows with the extracted answer, else the raw reply, under both keys in use."""
    replies = {r["id"]: (r["answer_prediction"], r["model_output"] or "") for r in records}
    pairs = [(row, *replies[name]) for row in rows if (name := str(row["id"])) in replies]
    texts = [(row, reply if answer is None else answer) for row, answer, reply in pairs]
    return [{**row, "model_prediction": text, "model_output": text} for row, text in texts]


# -- report.md -------------------------------------------------------------------------------------------------------


def _points(change: Mapping[str, Any]) -> str:
    """A difference of accuracies in points with its interval: `+4.0 [+1.2, +6.8]`."""
    low, high = change["ci95"]
    return f"{100 * change['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _markdown(report: Mapping[str, Any]) -> str:
    """Tables ready for a paper, then everything needed to repeat them."""
    accuracies = [(text, report[name]) for name, text in RULES.items()]
    head = ["accuracy %, 95 % Wilson interval", "over scored rows", "scored", "over all rows", "rows"]
    rows = [[text, interval(b), b["n_scored"], percent(b["accuracy_all"]), b["n_total"]] for text, b in accuracies]
    lines = [f"# {report['title']}", "", *table_lines(head, rows)]
    lines += [f"The official script drops {report['official_drops']}; over all rows they count as wrong.", ""]
    if sampled := report["sampled"]:
        rows = [[f"mean@{sampled['n']}", percent(sampled["mean_at_n"])]]
        rows += [[f"pass@{k}", percent(value)] for k, value in sampled["pass_at_k"].items()]
        rows += [[f"majority@{sampled['n']}", interval(sampled["majority_at_n"])]]
        lines += ["## Several samples (strict)", "", *table_lines(["", "%"], rows)]
    if len(audio := report["audio"]) > 1:
        rows = [
            [text, interval(audio[name]), _points(change) if (change := audio.get(f"real_minus_{name}")) else ""]
            for name, text in CONDITIONS.items()
            if name in audio
        ]
        head = ["", "accuracy %", "real minus this, points"]
        lines += ["## What the audio contributes (strict)", "", *table_lines(head, rows)]
    lines += turn_lines(turns) if (turns := report.get("turn_taking")) else []
    for column, values in report["breakdown"].items():
        rules = ("official", "official_extracted", "strict")
        rows = [[value, entry["n"], *(interval(entry[rule]) for rule in rules)] for value, entry in values.items()]
        head = [column, "n", "official", "official, extracted", "strict"]
        lines += [f"## By {column}", "", *table_lines(head, rows)]
    rows = [
        ["rows without a reply", report["n_missing"]],
        ["rows whose answer cannot be read", report["n_unparseable"]],
        ["replies whose answer cannot be read %", percent(report["share_unparseable"])],
        ["replies cut by the length limit %", percent(report["share_truncated"])],
        ["mean thinking length, words", number(report["mean_thinking_words"], 1)],
        ["mean completion length, tokens", number(report["mean_completion_tokens"], 1)],
        ["reasoning consistent with the answer %", percent(report["consistency_rate"])],
        *([name, number(value, 3)] for name, value in report.items() if name.startswith("reward_")),
    ]
    lines += ["## Replies", "", *table_lines(["", ""], rows), *provenance_lines(report)]
    if problems := report.get("problems"):
        lines += ["", "## Worth knowing", "", *(f"- {problem}" for problem in problems)]
    return "\n".join([*lines, ""])


# -- comparison -----------------------------------------------------------------------------------------------------


def compare_runs(a: Path, b: Path) -> dict[str, Any]:
    """B minus A, per verdict: over all shared rows, dropped and missing replies counted as wrong; also per breakdown.

    Raises:
        EvalInputError: not two finished evaluations, other rows, or another answer key.
    """
    (report_a, rows_a), (report_b, rows_b) = _read_run(a), _read_run(b)
    problems = []
    if report_a["answer_key_sha256"] != report_b["answer_key_sha256"]:
        problems.append(
            f"the answer keys differ: {a} used {report_a['data']} ({report_a['version']}), "
            f"{b} used {report_b['data']} ({report_b['version']})"
        )
    for name, here, there in ((a, rows_a, rows_b), (b, rows_b, rows_a)):
        if extra := [i for i in here if i not in there]:
            problems.append(f"only {name} has {count_rows(extra)}")
    if problems:
        raise EvalInputError(problems)
    pairs = [(record, rows_b[i]) for i, record in rows_a.items()]
    groups: dict[str, dict[str, list[tuple[Record, Record]]]] = {}
    for pair in pairs:
        for column, value in pair[0]["breakdown"].items():
            groups.setdefault(column, {}).setdefault(value, []).append(pair)
    verdicts = [v for v in COMPARED if any(row_score(record, v) is not None for record in rows_a.values())]
    main = "timing" if "timing" in verdicts else "strict"
    settings = {k: [report_a.get(k), report_b.get(k)] for k in ("prompt", "decoding")}
    return {
        "a": str(a),
        "b": str(b),
        "n": len(rows_a),
        "differs_also_in": {k: both for k, both in settings.items() if both[0] != both[1]},
        **{verdict: _difference(pairs, verdict) for verdict in verdicts},
        "breakdown": {
            column: {value: _difference(part, main) for value, part in sorted(values.items())}
            for column, values in groups.items()
        },
    }


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Record]]:
    """(report.json, id -> record) of a finished evaluation.

    Raises:
        EvalInputError: one of them is missing or damaged, or the rows are not those of the report.
    """
    if absent := " and no ".join(name for name in ("report.json", "rows.jsonl") if not (folder / name).is_file()):
        raise EvalInputError([f"{folder}: no {absent}; is this the --output of a finished `covo-rl eval`?"])
    try:
        report, rows = read_record(folder / "report.json"), RecordLog(folder / "rows.jsonl").read()
    except ValueError as error:
        raise EvalInputError([str(error)]) from error
    if absent := " and no ".join(name for name in ("answer_key_sha256", "data", "version", "n") if name not in report):
        raise EvalInputError([f"{folder / 'report.json'} has no {absent}; is it of another tool?"])
    if len(rows) != report["n"]:
        raise EvalInputError([f"{folder}: {len(rows)} rows, its report is over {report['n']}; evaluate it again"])
    return report, {record["id"]: record for record in rows}


def _difference(pairs: list[tuple[Record, Record]], verdict: str) -> dict[str, Any]:
    a, b = ([row_score(record, verdict) or 0.0 for record in records] for records in zip(*pairs, strict=True))
    return {"accuracy_a": sum(a) / len(a), "accuracy_b": sum(b) / len(b), **compare_pairs(a, b)}


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """The comparison as Markdown tables."""

    def table(blocks: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
        head = ["", "n", "A %", "B %", "B - A, points [95 %]", "only A right", "only B right", "McNemar p"]
        return table_lines(head, [
            [name, d["n"], percent(d["accuracy_a"]), percent(d["accuracy_b"]), _points(d), d["only_a"], d["only_b"],
             f"{d['p_value']:.4f}{' *' if d['p_value'] < 0.05 else ''}"]
            for name, d in blocks
        ])  # fmt: skip

    lines = [f"A: {result['a']}", "", f"B: {result['b']}", ""]
    lines += table((text, result[verdict]) for verdict, text in COMPARED.items() if verdict in result)
    main = "At the right time" if "timing" in result else "Strict"
    for column, values in result["breakdown"].items():
        lines += [f"{main}, by {column}", "", *table(values.items())]
    for what, (a, b) in result["differs_also_in"].items():
        lines.append(f"The two also differ in {what}: A {json.dumps(a)}, B {json.dumps(b)}.")
    return "\n".join(lines)


# -- plots -----------------------------------------------------------------------------------------------------------


def _draw(report: Mapping[str, Any], folder: Path) -> None:
    """PNG plots of what there is data for: accuracy per group, by audio length, and per audio condition.

    Horizontal bars in percent with 95 % intervals and the number of rows.
    """
    from matplotlib.figure import Figure  # without pyplot, whose backend is the program's

    bars = {column: [(value, entry["strict"]) for value, entry in values.items()]
            for column, values in report["breakdown"].items()}  # fmt: skip
    lengths = bars.pop("audio length", [])
    groups = [(f"{column}: {value}", block) for column, blocks in bars.items() for value, block in blocks]
    audio = [(name, report["audio"][name]) for name in ("real", "swapped", "silent", "none") if name in report["audio"]]
    for name, title, rows in (
        ("accuracy.png", "strict accuracy", [("all", report["strict"]), *groups]),
        ("audio_length.png", "strict accuracy by audio length", lengths),
        ("listening.png", "strict accuracy by audio", audio if len(audio) > 1 else []),
    ):
        rows = [(label, block) for label, block in rows if block["accuracy"] is not None]
        if not rows:
            continue
        labels = [visible(f"{label} (n={block['n_scored']})") for label, block in rows]
        values, blocks = [100 * block["accuracy"] for _, block in rows], [block for _, block in rows]
        low = [max(0.0, value - 100 * block["ci95"][0]) for value, block in zip(values, blocks, strict=True)]
        high = [max(0.0, 100 * block["ci95"][1] - value) for value, block in zip(values, blocks, strict=True)]
        figure = Figure(figsize=(7, 1.2 + 0.32 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(rows)), values, xerr=[low, high], height=0.65, color="#4c72b0", ecolor="#333333", capsize=2)
        axes.set_yticks(range(len(rows)), labels, parse_math=False)
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="% right, 95 % interval")
        axes.set_title(visible(f"{report['title']}: {title}"), fontsize=10, parse_math=False)
        figure.savefig(folder / name, dpi=120)
