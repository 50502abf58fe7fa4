"""`covo-rl eval --suite covo-audio --runs DIR`: the published tables of a model, with ours beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from covo_rl.data.files import read_record
from covo_rl.evaluate.sets import EvalInputError, EvalSet, load_set
from covo_rl.evaluate.speech.groups import published_figures
from covo_rl.evaluate.speech.judge_prompts import OWN_LABEL
from covo_rl.evaluate.speech.report import is_speech_report, published_lines, read_speech_report
from covo_rl.evaluate.speech.sets import KINDS, SpeechSet
from covo_rl.evaluate.tables import source_lines

#: suite -> its sets, in the order of its tables; those of arXiv 2602.09823
SUITES = {
    "covo-audio": (
        "mmau-test-mini", "mmau-test", "mmar", "mmsu", "uro-bench", "mtr-duplexbench", "vstyle", "vcb-bench",
        "air-bench", "covost2", "asr", "spoken-lm", "seed-tts", "mmau-pro",
    ),
}  # fmt: skip


def suite_markdown(suite: str, runs: Sequence[Path]) -> str:
    """A table a set. `runs` are folders of finished evaluations, or hold such folders; of a set that several have
    scored, each sub-set is taken from the last that has a score of it.

    Raises:
        EvalInputError: no such suite, or a folder without a report.
    """
    if suite not in SUITES:
        raise EvalInputError([f"--suite {suite}: there is {', '.join(SUITES)}"])
    folders = _folders(runs)
    reports = [_report(folder) for folder in folders]
    ours = f"from {', '.join(map(str, folders))}" if folders else "none; name finished evaluations by --runs DIR"
    lines = [f"# {suite}", "", f"Published scores, and ours: {ours}", ""]
    for name in SUITES[suite]:
        found = load_set(name)
        own = [report for report in reports if report["set"] == name]
        lines += [f"## {found.title}", ""]
        if isinstance(found, SpeechSet):
            subsets, groups = _best_blocks(own, "subsets"), _best_blocks(own, "groups")
            lines += published_lines(published_figures(found, subsets, groups))
            if not any(KINDS[kind].higher_is_better for kind in found.kinds):
                lines += ["Error rates: lower is better.", ""]
        else:
            last = own[-1] if own else {}
            rule = _rule(last)
            lines += published_lines(letter_figures(found, last, rule))
            lines += [f"Ours: {_RULES[rule]}.", ""] if own else []
        lines += [*source_lines(found.published_in), ""]
    if any(f"({OWN_LABEL})" in line for line in lines):
        lines += [f"{OWN_LABEL}: judged by our wording; --judge-prompt NAME=FILE takes the published one", ""]
    others = sorted({report["set"] for report in reports} - set(SUITES[suite]))
    lines += [f"Not in this suite: {', '.join(others)}", ""] if others else []
    return "\n".join(lines)


def _best_blocks(reports: Sequence[Mapping[str, Any]], part: str) -> dict[str, Any]:
    """Of each sub-set or group the last block; one without a score, or partial, takes the place of no better one."""

    def rank(block: Mapping[str, Any]) -> int:
        return (block.get("score") is not None) + (block.get("score") is not None and not block.get("partial"))

    best: dict[str, Any] = {}
    for report in reports:
        best |= {name: block for name, block in report[part].items() if rank(block) >= rank(best.get(name, {}))}
    return best


#: verdict -> what is said of it
_RULES = {
    "official": "the official rule on the raw reply",
    "official_extracted": "the official rule on the answer block",
}


def _rule(report: Mapping[str, Any]) -> str:
    """Whole replies where they were asked for by the published wording or come from a file, else the answer block: ours
    has the reasoning before it."""
    prompt = report.get("prompt") or {}
    return "official" if report.get("predictions") or prompt.get("name") == "official" else "official_extracted"


def letter_figures(found: EvalSet, report: Mapping[str, Any], rule: str) -> list[dict[str, Any]]:
    """Rows of a table of a set of letters, as published_figures makes them; `ours` in percent."""
    edition, n = str(report.get("version", "")), report.get("n")
    why = f"{n} of {found.rows} rows" if n not in (None, found.rows) else ""
    if report and not edition.startswith(found.published_edition):
        why = f"edition {edition}"
    rows = []
    for figure, by_model in found.published.items():
        column, _, value = figure.partition(": ")
        block = report if figure == "overall" else report.get("breakdown", {}).get(column, {}).get(value, {})
        accuracy = block.get(rule, {}).get("accuracy")
        rows.append({
            "name": figure, "ours": None if accuracy is None else 100 * accuracy, "n": n, "not_comparable": why,
            "published": dict(by_model),
        })  # fmt: skip
    return rows


def _is_letter_report(folder: Path) -> bool:
    return (folder / "rows.jsonl").is_file() and (folder / "report.json").is_file()


def _report(folder: Path) -> dict[str, Any]:
    if is_speech_report(folder):
        return read_speech_report(folder)
    report = read_record(folder / "report.json")
    if "set" not in report:
        raise EvalInputError([f"{folder}: its report.json names no set; is it the --output of `covo-rl eval`?"])
    return report


def _folders(runs: Sequence[Path]) -> list[Path]:
    folders, problems = [], []
    for run in runs:
        places = [run] if (run / "report.json").is_file() else sorted(run.glob("*/"))
        inside = [place for place in places if is_speech_report(place) or _is_letter_report(place)]
        folders += inside
        if not inside:
            problems.append(f"--runs {run}: no finished evaluation in it, or one folder below it")
    if problems:
        raise EvalInputError(problems)
    return folders
