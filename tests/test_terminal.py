"""Finding 27: what files and models wrote reaches the terminal as text, and every file as it is."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from report_pages import packed
from rich.table import Table
from typer.testing import CliRunner

from covo_rl.data import Problem
from covo_rl.data.terminal import Terminal, say
from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.run.report.curves import curves
from covo_rl.run.report.page import report_page
from covo_rl.types import Clip, Example, visible

EVIL = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x9b31m", "a\u202eb\u2066c", "a\u200bb\ufeff", "a\rb", "a\x00b\x08", "[/]",
    "[bold]x[/bold]", "[link=http://x]y[/link]", "./boom.py:boom", ":bomb:", "\ud83d", "\u2028", "\U000e0041", "\x85",
]  # fmt: skip
#: what must not arrive raw
RAW = ("\x1b", "\x9b", "\x07", "\u202e", "\u2066", "\u200b", "\ufeff", "\r", "\x00", "\x08", "\ud83d", "\u2028", "\x85")


class Screen(io.StringIO):
    """A terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def shown(capsys):
    out = capsys.readouterr()
    text = out.out + out.err
    assert not [char for char in RAW if char in text]
    assert "\N{COLLISION SYMBOL}" not in text and "\N{BOMB}" not in text
    return text


@pytest.mark.parametrize("text", EVIL)
def test_a_string_is_shown_as_text_wherever_it_is_printed(text, capsys):
    """finding 27: messages, tables, titles, progress."""
    say(text)
    say(text, err=True)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    terminal = Terminal(width=120)
    for item in (text, table, console.summary_table(text, [(text, text)])):
        terminal.print(item)
    with console.ProgressDisplay(text, 2, steps=1) as progress:
        progress.update(1, text)
    with console.ProgressDisplay(text, 2, stderr=True) as progress:
        progress.update(2, text)
    assert shown(capsys).count(visible(text)) >= 8


@pytest.mark.parametrize("text", EVIL)
def test_a_progress_bar_on_a_terminal_takes_it_too(text, monkeypatch):
    """finding 27: title and text of a rich progress bar are no markup."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with console.ProgressDisplay(text, 2, stderr=True) as progress:
        progress.update(1, text)
    bare = screen.getvalue()
    assert visible(text) in bare and not [char for char in RAW if char in bare and char not in "\x1b\r"]
    assert "\x1b[31m" not in bare and "\x1b]0" not in bare


def test_text_of_any_language_is_not_touched():
    """finding 27: escaping is for what does not print."""
    for text in (
        "caf\u00e9",
        "\u5feb\u4e50",
        "\u0645\u0631\u062d\u0628\u0627",
        "a\u00a0b\u3000c",
        "\N{BELL}",
        "A\u0301",
        "1\u00bd \u2264 2",
    ):
        assert visible(text) == text
    assert visible("a\nb\tc") == r"a\nb\tc" and visible("a\nb", "\n") == "a\nb"


def test_ids_keep_their_line(capsys):
    """finding 27: a line break in an id cannot write a line of its own into a message."""
    assert str(Problem("r\n1\x1b[0m", "lost\nit")) == r"r\n1\x1b[0m: lost\nit"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_of_the_terminal_is_an_error(encoding):
    """finding 27: what an encoding lacks is escaped, also the ellipsis and the lines of rich's own tables."""
    code = (
        "from covo_rl.data.terminal import say, Terminal; from covo_rl.records.console import console, summary_table\n"
        "say('caf\\u00e9 \\u5feb \\ud83d'); say('\\u5feb', err=True); console.print('\\u5feb')\n"
        "console.print(summary_table('\\u5feb', [('\\u5feb' * 90, '\\u5feb' * 90)]))\n"
        "from covo_rl.cli import main; main(['rewards', 'try', '--completion', '<think>\\u5feb</think>'])\n"
    )
    env = {**os.environ, "PYTHONIOENCODING": encoding, "LANG": "C", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (b"\\u5feb" in done.stdout) == (encoding != "utf-8")


def test_the_check_of_a_data_set_shows_ids_as_text(tmp_path):
    """finding 27: ids with ANSI, markup, bidi marks and line breaks, in the tables and in --json."""
    from covo_rl.run.commands.data import app

    ids = [text for text in EVIL if "\ud83d" not in text] + ["a\nb"]
    rows = [{"id": name, "audio": "no[/].wav", "question": "q", "choices": ["a"], "answer": "a"} for name in ids]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    runner = CliRunner()
    result = runner.invoke(app, ["check", str(tmp_path / "rows.json")])
    assert result.exit_code == 1 and not [char for char in RAW if char in result.output]
    for name in ids:
        assert visible(name) in result.output
    as_json = runner.invoke(app, ["check", str(tmp_path / "rows.json"), "--json"])
    assert as_json.output.isascii() and len(json.loads(as_json.output)["data"]["problems"]) >= len(ids)


def test_wrong_words_of_a_command_are_shown_as_text(capsys):
    """finding 27: typer's own messages pass the same way."""
    from covo_rl.cli import main

    for words in (["data", "check", "--\x1b[31mfoo"], ["report", "/no\x1b[31m[/]\u202e"], ["rewards", "try"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert "--help" in shown(capsys)


def test_the_last_message_of_a_program_is_shown_as_text():
    """finding 27: what a recipe hands to sys.exit."""
    from covo_rl.train.shutdown import exit_after

    def fail():
        sys.exit("row \x1b[31m7\u202e\nis bad")

    with pytest.raises(SystemExit) as stop:
        exit_after(fail)
    assert stop.value.code == "row \\x1b[31m7\\u202e\nis bad"


METRICS = {"step": 1, "reward_total": 1.0, "completion_length": 3, "zero_variance_groups": 0, "truncated": 0}


def test_lone_surrogates_are_written_and_read_back(tmp_path):
    """finding 27: rollouts, metrics, configuration and result, with rationale, id and completion."""
    run = Run(tmp_path)
    text = "a\ud83d \\ b\udcff \\\ud83d"
    row = {"id": text, "completion": text, "answer": "x", "reward_total": 1.0, "advantage": 0.0, "rationale": [text]}
    run.write_config({"output": text, "rewards": {text: 1.0}})
    run.log_metrics({**METRICS, "note": text})
    run.log_rollouts(1, [row])
    run.write_json("result.json", {"before": {text: 1}, "after": {text: 2}})
    from covo_rl.data.files import read_json_lines
    from covo_rl.resolve import read_yaml

    assert list(read_json_lines(tmp_path / "rollouts" / "step_00001.jsonl")) == [row]
    assert run.metrics()[0]["note"] == text and read_yaml(tmp_path / "config.yaml")["output"] == text
    page = report_page(tmp_path)
    assert page.encode() and packed(page)["groups"][0]["rollouts"][0]["completion"].startswith(r"a\ud83d")


def test_the_page_of_a_run_holds_nothing_but_text(tmp_path):
    """finding 27: markup, a script's end, bidi marks and controls in every cell, title and option."""
    run = Run(tmp_path)
    evil = "</td><script>x</script>\u202e\x1b[31m{{ 7 * 7 }}"
    run.write_config({"output": evil, evil: [evil, {"a": evil}]})
    row = {"id": evil, "completion": evil, "answer": evil, "reward_total": 1.0, "advantage": 0.0}
    run.log_rollouts(1, [row])
    run.write_json("result.json", {"before": {evil: 1}, "after": {evil: 2}})
    page = report_page(tmp_path)
    assert "<script>x" not in page and page.count("<script") == 3 and "\u202e" not in page and "\x1b" not in page
    content = packed(page)
    assert content["runs"][0]["config"]["output"] == content["groups"][0]["id"] == visible(evil)  # 7 * 7 stays


def test_names_with_dollar_signs_draw_curves(tmp_path):
    """finding 27: matplotlib reads `$...$` as mathematics, and fails on what is none, after hours."""
    name = "reward_./my$\\frac$.py:score\ud83d"
    assert curves([{**METRICS, name: 1.0, "reward_b": 0.5}], tmp_path / "a.png").is_file()


def test_reports_of_an_evaluation_draw_any_category(tmp_path):
    """finding 27: categories come from the data."""
    from covo_rl.evaluate.report import _draw

    block = {"accuracy": 0.5, "ci95": [0.4, 0.6], "n_scored": 3}
    breakdown = {"task": {"$\\frac$ \ud83d\n[/]": {"strict": block}}}
    _draw({"breakdown": breakdown, "audio": {"real": block}, "strict": block, "title": "$\\x$"}, tmp_path)
    assert (tmp_path / "accuracy.png").is_file()


def test_an_option_that_holds_a_tag_of_the_reply_is_refused_with_its_row():
    """finding 29: no reply could name it; in a question a tag is text like any other."""
    from covo_rl.data import row_problems

    clip = Clip(array=np.full(16000, 0.1, np.float32), sampling_rate=16000)
    rows = [
        Example("0", (clip,), "What does </think> close?", ("dog", "cat"), "cat"),
        Example("1", (clip,), "q", ("</think>", "cat"), "</think>"),
        Example("2", (clip,), "q", ("dog", "a <answer> b"), "dog"),
        Example("3", (clip,), "q", (), "<think>x</think>"),
    ]
    problems = row_problems(rows)
    assert [problem.row_id for problem in problems] == ["1", "2", "3"]
    assert all("no reply could name it inside <answer>" in problem.what for problem in problems)


@pytest.mark.parametrize("answer", ["</think>", "<answer>", "a</answer>b", "<think>a</think><answer>b</answer>", " "])
def test_the_linter_says_so_and_goes_on(answer):
    """finding 29: a row whose answer no completion can hold is a finding with its id, not a traceback."""
    from covo_rl.rewards import lint

    rows = [Example("r\n7", (), "q", (answer, "cat"), answer), Example("8", (), "q", ("dog", "cat"), "cat")]
    findings = lint(["accuracy"], rows)
    assert [finding.what for finding in findings if r"row r\n7" in finding.what] and len(findings) == 1


@pytest.mark.parametrize("column", ["evidence", "think", "reasoning", "cot"])
def test_reasoning_of_a_row_may_hold_tags(column):
    """finding 29: a data set's own `<think>...</think>` column does not stop a dry run."""
    from covo_rl.rewards import lint
    from covo_rl.rewards.linter import gold_completion

    text = "<think>I hear a cat, so it is a cat.</think>"
    row = Example("7", (), "q", ("dog", "cat"), "cat", {column: text})
    assert gold_completion(row).endswith("so the answer is cat.</think><answer>cat</answer>")
    assert lint(["accuracy", "format"], [row]) == []


def test_the_evidence_teacher_names_the_row():
    """finding 29: as the column teacher does."""
    import random

    from covo_rl.supervised import Stage
    from covo_rl.supervised.rows import TeacherError, completion

    for row in (
        Example("r7", (), "q", ("a", "b"), "a", {"evidence": "x</think>y"}),
        Example("r7", (), "q", ("<answer>", "b"), "<answer>", {"evidence": "x"}),
    ):
        with pytest.raises(TeacherError, match="r7: no completion can hold"):
            completion(row, Stage(), random.Random(0))


def test_tracebacks_and_warnings_of_a_program_are_shown_as_text():
    """finding 27: what a library's exception or warning quotes of a file."""
    code = (
        "import warnings; from covo_rl.train.shutdown import exit_after\n"
        "def main():\n    warnings.warn('a\\x1b[31m\\u202e')\n"
        "    raise KeyError('x') from ValueError('b\\x1b[31m\\u202e')\n"
        "exit_after(main)"
    )
    for encoding in ("utf-8", "ascii"):
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=120)
        text = done.stderr.decode()
        assert done.returncode == 1 and r"a\x1b[31m\u202e" in text and r"b\x1b[31m\u202e" in text
        assert not [char for char in RAW if char in text]


def test_cells_of_a_markdown_report_stay_in_their_table():
    """finding 27: a category with line breaks, pipes, code or HTML writes no row or heading of its own."""
    from covo_rl.evaluate.tables import table_lines

    lines = table_lines(["a\n# b", "n"], [["x\n\n# 99 % | <img src=y> `", 1]])
    assert lines == [r"| a\\n# b | n |", "|---|---:|", r"| x\\n\\n# 99 % \| \<img src=y> \` | 1 |", ""]


def test_rows_without_a_target_are_named_in_one_line_each():
    """finding 27: ids with line breaks, as in every other message."""
    from covo_rl.rewards.call import _row
    from covo_rl.supervised import Stage
    from covo_rl.supervised.checks import unreadable
    from covo_rl.supervised.rows import TeacherError, completions

    rows = [Example("r\n# 1\x1b", (), "q", (), "a", {"completion": None})] * 2
    with pytest.raises(TeacherError) as error:
        completions(rows, Stage(teacher="column"), 0)
    assert str(error.value).splitlines() == [r"r\n# 1\x1b: no text in column 'completion'; it has completion"] * 2
    assert unreadable(rows, ["x"] * 2, Stage(teacher="column"))[0].startswith(r"r\n# 1\x1b: no")
    assert _row({"id": ["r\n1"], "completions": ["c"]}, 0) == r" for row r\n1, completion 'c'"


def test_what_a_plugin_prints_is_shown_as_text():
    """finding 27: a completion that a reward prints while it is looked into, also one cut inside a character."""
    from covo_rl.rewards.keeper import PIECE, PluginOutput

    ends = [os.pipe(), os.pipe()]
    text = "\x1b[31m\u202e caf\u00e9\r\n" + "\u5feb" * PIECE
    for char in (text.encode() + b"\xff", b""):
        os.write(ends[0][1], char)
    os.close(ends[0][1])
    errors = os.dup(2)
    os.dup2(ends[1][1], 2)
    try:
        output = PluginOutput("./p.py:f", ends[0][0])
        while output.relay():
            pass
    finally:
        os.dup2(errors, 2)
        os.close(ends[1][1])
    with open(ends[1][0], "rb") as file:
        shown = file.read().decode()
    os.close(errors)
    os.close(ends[0][0])
    assert shown == "\\x1b[31m\\u202e caf\u00e9\\r\n" + "\u5feb" * PIECE + "\\xff" and not output.cut
