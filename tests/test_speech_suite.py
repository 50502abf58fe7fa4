"""Published tables with ours beside them: the sets of letters."""

import pytest
from speech_layouts import write_lines
from typer.testing import CliRunner

from covo_rl.evaluate.cli import app
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.speech.suite import suite_markdown


def test_tables_of_letters_stand_in_the_suite(tmp_path):
    rows = {"official": {"accuracy": 0.75}, "official_extracted": {"accuracy": 0.5}}
    report = {"set": "mmar", "version": "unknown", "n": 4, **rows, "breakdown": {"modality": {"speech": rows}}}
    for name, more in (("file", {"predictions": "replies.jsonl"}), ("model", {"prompt": {"name": "covo"}})):
        write_lines(tmp_path / f"{name}/mmar/report.json", [report | more])
        write_lines(tmp_path / f"{name}/mmar/rows.jsonl", [])
    text = suite_markdown("covo-audio", [tmp_path / "file"])
    assert "| overall | - | 75.00 (4 of 1000 rows) | 55.30 | 56.70 |" in text
    assert "| modality: speech | - | 75.00 (4 of 1000 rows) | 62.50 |" in text
    assert "Ours: the official rule on the raw reply." in text
    assert "| overall | - |  | 75.30 | 77.58 |" in text, "MMAU's, of which there is none of ours"
    text = suite_markdown("covo-audio", [tmp_path / "model"])
    assert "50.00 (4 of 1000 rows)" in text and "Ours: the official rule on the answer block." in text
    listed = CliRunner().invoke(app, ["--list", "--set", "mmsu"])
    assert "overall: Covo-Audio 66.64" in listed.output


def test_a_score_of_another_edition_stands_apart(tmp_path):
    whole = {"set": "mmau-test-mini", "n": 1000, "predictions": "x", "official": {"accuracy": 0.7}, "breakdown": {}}
    old = "original, October 2024"
    cells = {"v05.15.25, one": "| overall | 70.00 |  | 75.30 |", old: f"| overall | - | 70.00 (edition {old}) |"}
    for version, cell in cells.items():
        write_lines(tmp_path / "mini/report.json", [{**whole, "version": version}])
        write_lines(tmp_path / "mini/rows.jsonl", [])
        assert cell in suite_markdown("covo-audio", [tmp_path / "mini"])


def test_a_report_of_another_version_is_refused_by_its_name(tmp_path):
    write_lines(tmp_path / "scores.jsonl", [])
    whole = {"set": "asr", "groups": {}, "published": [], "data_sha256": "0"}
    for subsets in ({"x": {"score": 1.0}}, {"x": {"kind": "new", "score": 1.0}}, []):
        write_lines(tmp_path / "report.json", [{**whole, "subsets": subsets}])
        with pytest.raises(
            EvalInputError, match=r"report\.json: subsets: .*no kind that this version of covo-rl knows"
        ):
            suite_markdown("covo-audio", [tmp_path])


def test_a_score_is_not_hidden_by_a_later_run_without_one(tmp_path):
    whole = {"set": "uro-bench", "published": [], "data_sha256": "0"}
    runs = {
        "a": ({"score": 70.0, "kind": "uro_open", "n": 199, "missing": 0}, {"score": 60.0, "partial": False}),
        "b": ({"score": None, "kind": "uro_open", "n": 199, "missing": 0}, {"score": 50.0, "partial": True}),
    }
    for name, (block, group) in runs.items():
        report = {**whole, "subsets": {"AlpacaEval": block}, "groups": {"basic_en": {**group, "missing": []}}}
        write_lines(tmp_path / f"{name}/report.json", [report])
        write_lines(tmp_path / f"{name}/scores.jsonl", [])
    text = suite_markdown("covo-audio", [tmp_path])
    assert "| AlpacaEval | 70.00 |  | 85.73 |" in text and "| basic_en | 60.00 |  |" in text
