"""`covo-rl eval --suite covo-audio --runs DIR`: the published tables of a model, with ours beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from covo_rl.evaluate.sets import EvalInputError, load_set
from covo_rl.evaluate.speech.groups import published_figures
from covo_rl.evaluate.speech.report import is_speech_report, published_lines, read_speech_report
from covo_rl.evaluate.speech.sets import SpeechSet

#: suite -> its sets, in the order of its tables; those of arXiv 2602.09823
SUITES = {
    "covo-audio": (
        "uro-bench", "mtr-duplexbench", "vstyle", "vcb-bench", "air-bench", "covost2", "asr", "spoken-lm", "seed-tts",
        "mmau-pro",
    ),
}  # fmt: skip


def suite_markdown(suite: str, runs: Sequence[Path]) -> str:
    """A table a set. `runs` are folders of finished evaluations, or hold such folders; of a set that several have
    scored, each sub-set is taken from the last that has it.

    Raises:
        EvalInputError: no such suite, or a folder without a report.
    """
    if suite not in SUITES:
        raise EvalInputError([f"--suite {suite}: there is {', '.join(SUITES)}"])
    reports = [read_speech_report(folder) for folder in _folders(runs)]
    lines = [f"# {suite}", ""]
    for name in SUITES[suite]:
        found = load_set(name)
        assert isinstance(found, SpeechSet)
        subsets: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        for report in reports:
            if report["set"] == name:
                subsets |= report["subsets"]
                groups |= report["groups"]
        lines += [f"## {found.title}", "", *published_lines(published_figures(found, subsets, groups))]
        lines += [f"{model}: {where}" for model, where in found.published_in.items()] + [""]
    others = sorted({report["set"] for report in reports} - set(SUITES[suite]))
    lines += [f"Not in this suite: {', '.join(others)}", ""] if others else []
    return "\n".join(lines)


def _folders(runs: Sequence[Path]) -> list[Path]:
    folders, problems = [], []
    for run in runs:
        inside = [run] if is_speech_report(run) else sorted(p for p in run.glob("*/") if is_speech_report(p))
        folders += inside
        if not inside:
            problems.append(f"--runs {run}: no finished evaluation of a set of speech in it, or one folder below it")
    if problems:
        raise EvalInputError(problems)
    return folders
