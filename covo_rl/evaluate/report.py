"""Records -> report.json, report.md and the MMAU submission file. A number never appears without what it depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from covo_rl.data.files import write_atomically
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.sets import EvalSet
from covo_rl.evaluate.statistics import compare_pairs
from covo_rl.evaluate.summary import row_score, summarize
from covo_rl.records.console import percent

RULES = {
    "official": "official rule, raw reply",
    "official_extracted": "official rule, extracted answer",
    "strict": "strict, extracted answer",
    "strict_raw": "strict, raw reply",
}
CONDITIONS = {"real": "real audio", "silent": "silence of the same length", "swapped": "another row's audio",
              "none": "no audio (text only)"}  # fmt: skip


def audio_figures(by_audio: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Strict accuracy per audio condition, and real minus each other one with its paired interval."""
    from covo_rl.evaluate.summary import accuracy

    figures: dict[str, Any] = {audio: accuracy(records, "strict") for audio, records in by_audio.items()}
    real = {record["id"]: row_score(record, "strict") for record in by_audio["real"]}
    for audio, records in by_audio.items():
        if audio == "real":
            continue
        other = {record["id"]: row_score(record, "strict") for record in records}
        ids = [i for i, score in real.items() if score is not None and other.get(i) is not None]
        if ids:
            pair = compare_pairs([other[i] or 0.0 for i in ids], [real[i] or 0.0 for i in ids])
            figures[f"real_minus_{audio}"] = {"mean": pair.mean, "ci95": list(pair.ci95), "p_value": pair.p_value}
    return figures


def build_report(
    eval_set: EvalSet, by_audio: Mapping[str, Sequence[Record]], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of report.json. `meta` says what was evaluated on what (settings, hashes, problems)."""
    return {
        "set": eval_set.name,
        "title": eval_set.title,
        "source": eval_set.source,
        "licence": eval_set.licence,
        "official_rule": eval_set.scorer_rule,
        "official_drops": eval_set.official_drops,
        "expected_rows": eval_set.rows,
        **meta,
        **summarize(by_audio["real"]),
        "audio": audio_figures(by_audio),
    }


def submission(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """MMAU's submission: the data file's rows with the extracted answer, else the raw reply, under both keys in use."""
    replies = {
        r["id"]: r["answer_prediction"] if r["answer_prediction"] is not None else r["model_output"] for r in records
    }
    return [
        {
            **row,
            "model_prediction": replies.get(str(row["id"])) or "",
            "model_output": replies.get(str(row["id"])) or "",
        }
        for row in rows
        if str(row["id"]) in replies
    ]


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda file: json.dump(content, file, indent=2))


def interval(block: Mapping[str, Any]) -> str:
    """`62.5 [55.1, 69.3]`, or a dash."""
    if block["accuracy"] is None:
        return "-"
    low, high = block["ci95"]
    return f"{percent(block['accuracy'])} [{percent(low)}, {percent(high)}]"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; the first column is text, the others numbers. Pipes in cells are escaped."""
    line = "| " + " | ".join(head) + " |"
    rule = "|---" + "|---:" * (len(head) - 1) + "|"
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [line, rule, *body, ""]


def markdown(report: Mapping[str, Any]) -> str:
    """report.md: tables ready for a paper, then everything needed to repeat them."""
    lines = [f"# {report['title']}", ""]
    lines += _accuracy_table(report)
    if report["sampled"]:
        lines += _sampled_table(report["sampled"])
    if len(report["audio"]) > 1:
        lines += _audio_table(report["audio"])
    for column, values in report["breakdown"].items():
        head = [column, "n", "official", "official, extracted", "strict"]
        cells = [
            [value, entry["n"], *(interval(entry[name]) for name in ("official", "official_extracted", "strict"))]
            for value, entry in values.items()
        ]
        lines += [f"## By {column}", "", *table(head, cells)]
    return "\n".join(lines + _reply_table(report) + _provenance(report))


def _accuracy_table(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            text,
            interval(report[name]),
            report[name]["n_scored"],
            percent(report[name]["accuracy_all"]),
            report[name]["n_total"],
        ]
        for name, text in RULES.items()
    ]
    head = ["accuracy %, 95 % Wilson interval", "over scored rows", "scored", "over all rows", "rows"]
    note = f"The official script drops {report['official_drops']}; over all rows they count as wrong."
    return [*table(head, rows), note, ""]


def _sampled_table(sampled: Mapping[str, Any]) -> list[str]:
    n, vote = sampled["n"], sampled["majority_at_n"]
    rows = [[f"mean@{n}", percent(sampled["mean_at_n"])]]
    rows += [[f"pass@{k}", percent(value)] for k, value in sampled["pass_at_k"].items()]
    return ["## Several samples (strict)", "", *table(["", "%"], [*rows, [f"majority@{n}", interval(vote)]])]


def _audio_table(audio: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, text in CONDITIONS.items():
        if name in audio:
            change = audio.get(f"real_minus_{name}")
            gain = (
                ""
                if change is None
                else f"{100 * change['mean']:+.1f} [{100 * change['ci95'][0]:+.1f}, {100 * change['ci95'][1]:+.1f}]"
            )
            rows.append([text, interval(audio[name]), gain])
    return ["## What the audio contributes (strict)", "", *table(["", "accuracy %", "real minus this, points"], rows)]


def _reply_table(report: Mapping[str, Any]) -> list[str]:
    rows = [
        ["rows without a reply", report["n_missing"]],
        ["rows whose answer cannot be read", report["n_unparseable"]],
        ["replies whose answer cannot be read %", percent(report["share_unparseable"])],
        ["replies cut by the length limit %", percent(report["share_truncated"])],
        ["mean thinking length, words", _number(report["mean_thinking_words"])],
        ["mean completion length, tokens", _number(report["mean_completion_tokens"])],
        ["reasoning consistent with the answer %", percent(report["consistency_rate"])],
    ]
    rows += [[name, _number(value, 3)] for name, value in report.items() if name.startswith("reward_")]
    return ["## Replies", "", *table(["", ""], rows)]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _provenance(report: Mapping[str, Any]) -> list[str]:
    keys = (
        "set", "version", "data_sha256", "answer_key_sha256", "source", "licence", "model", "adapter",
        "predictions", "predictions_sha256", "prompt", "decoding", "official_rule", "packages",
    )  # fmt: skip
    rows = [f"- {key}: {json.dumps(report[key], ensure_ascii=False)}" for key in keys if report.get(key) is not None]
    problems = [f"- {problem}" for problem in report.get("problems", ())]
    return ["## To repeat this", "", *rows, "", *(["## Worth knowing", "", *problems, ""] if problems else [])]
