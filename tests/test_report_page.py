"""The report's file: what stands in it, what its policy admits, what the command says."""

import base64
import hashlib
import re
from pathlib import Path

import pytest
from report_contract import problems
from report_pages import EVIL, harmful, packed, payload
from typer.testing import CliRunner

from covo_rl.run.report import page
from covo_rl.run.report.page import render
from covo_rl.types import visible

VENDOR = Path(page.__file__).with_name("vendor")


def test_the_payload_comes_out_as_it_went_in_and_the_same_run_gives_the_same_page():
    content = harmful(payload(runs=2, steps=2, groups=3))
    assert problems(content) == []
    text = render(content)
    assert packed(text) == content
    assert render(content) == text


def test_what_a_run_wrote_stands_in_the_page_as_escaped_text_only():
    text = render(harmful(payload(steps=2, groups=3)))
    assert text.count("<script") == text.count("</script>") == 3
    assert "<img" not in text.split("<body>")[1].split("<script")[0] and "\u202e" not in text
    assert visible(EVIL).split("<")[0] in text and "{{ 7 * 7 }}" in text  # not 49


def test_the_policy_admits_the_scripts_and_styles_of_the_page_and_no_address():
    text = render(payload(steps=1, groups=1))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    rules = {words[0]: words[1:] for words in (rule.split() for rule in policy.split("; "))}
    bodies = {
        "script-src": re.findall(r"<script>(.*?)</script>", text, re.S),
        "style-src": re.findall(r"<style>(.*?)</style>", text, re.S),
    }
    for rule, found in bodies.items():
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in found]
        assert rules[rule] == hashes
    assert rules["default-src"] == ["'none'"] and "connect-src" not in rules
    assert not re.search(r"https?:", policy)
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert all(re.match("#|data:,", address) for address in re.findall(r'(?:src|href)="?([^"\s>]*)', outside))


def test_scripts_touch_the_page_by_text_only():
    scripts = [path.read_text() for path in sorted(VENDOR.parent.glob("static/*.js"))]
    assert len(scripts) == len(page.SCRIPTS)
    for script in scripts:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script)


def test_the_chart_library_is_the_published_file_and_its_licence_travels_with_each_page():
    digest = hashlib.sha256((VENDOR / "uPlot.iife.min.js").read_bytes()).hexdigest()
    assert digest in (VENDOR / "README.md").read_text()
    text = render(payload(steps=1, groups=1))
    assert "Copyright (c) 2022 Leon Sorokin" in text and "WITHOUT WARRANTY OF ANY KIND" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "is no run folder: it has no config.yaml"),
        ([".", "nowhere"], "nowhere is no run folder"),
        ([".", "--sounds", "loud"], "the choices are interest, none, all"),
        ([".", "--max-mb", "0"], "0.5"),
        ([".", "--output", "missing/report.html"], "give another --output"),
        ([".", "--output", "."], ". is a folder; give --output a file, as report.html"),
        ([], "Missing argument"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("model: builtin:tiny\n")
    done = CliRunner().invoke(page.app, words)
    assert done.exit_code == 2
    assert said in re.sub(r"[\s│]+", " ", done.output)
    assert [path.name for path in tmp_path.rglob("*")] == ["config.yaml"]


def test_the_command_writes_one_run_as_report_and_several_as_comparison(tmp_path, monkeypatch):
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").write_text(f"model: builtin:tiny\noutput: {run}\n")
    opened = []
    monkeypatch.setattr(page.webbrowser, "open", lambda url: opened.append(url) or True)
    done = CliRunner().invoke(page.app, [str(runs[0]), "--open"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(str(runs[0] / "report.html"))
    assert "MB): 0 rollouts of 0 steps, 0 sounds, 0 linked, 0 missing; notes in its overview: 3" in done.output
    assert not done.stderr  # of nothing there is no bar
    (runs[0] / "rollouts").mkdir()
    (runs[0] / "rollouts" / "step_00001.jsonl").write_text('{"completion": "x"}\n')
    done = CliRunner().invoke(page.app, [str(runs[0])])
    assert "1 rollouts of 1 steps" in done.stdout and re.fullmatch(r"rollouts: 1/1 +done\n", done.stderr)
    assert opened == [(runs[0] / "report.html").as_uri()]
    done = CliRunner().invoke(page.app, [*map(str, runs)])
    assert done.exit_code == 0, done.output
    content = packed((runs[0] / "compare.html").read_text())
    assert problems(content) == [] and [run["name"] for run in content["runs"]] == ["a", "b"]
