"""covo-rl rewards list, try, check, score."""

import json

import pytest
from typer.testing import CliRunner

from covo_rl.rewards import score
from covo_rl.rewards.cli import app
from covo_rl.rewards.columns import example_from_row, group_from_completions

runner = CliRunner()
GOOD = "<think>I hear it ring on and on, so it is a bell.</think><answer>A</answer>"
ROW = {"question": "What is it?", "choices": ["bell", "knock"], "answer": "bell", "extra": [1, 2]}


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def test_score_adds_rewards_and_keeps_rows(tmp_path):
    source = rows_file(tmp_path, {**ROW, "completion": GOOD}, {**ROW, "completion": "bell"},
                       {**ROW, "answer": "drum", "completion": GOOD})  # fmt: skip
    target = tmp_path / "scored.jsonl"
    result = runner.invoke(
        app, ["score", "--rewards", "accuracy,format=0.5", "--input", source, "--output", str(target)]
    )
    assert result.exit_code == 0, result.output
    scored = [json.loads(line) for line in target.read_text().splitlines()]
    assert scored[0] == {**ROW, "completion": GOOD, "rewards": {"accuracy": 1.0, "format": 1.0}, "reward_total": 1.5}
    assert scored[1]["rewards"] == {"accuracy": 0.0, "format": 0.0} and scored[1]["reward_total"] == 0.0
    assert scored[2]["rewards"] == {"accuracy": None, "format": 1.0} and scored[2]["reward_total"] == 0.5
    assert "accuracy: mean 0.5000 of 2 graded, 1 None" in result.output


def test_score_says_what_is_wrong_with_its_input(tmp_path):
    target = ["--output", str(tmp_path / "out.jsonl")]
    for row, arguments, message in [
        (ROW, ["--input", str(tmp_path / "none.jsonl")], "No such file"),
        (ROW, [], "row 1: needs a text `completion`"),
        ({**ROW, "completion": ""}, ["--rewards", "formt"], "did you mean 'format'"),
    ]:
        source = rows_file(tmp_path, row)
        result = runner.invoke(app, ["score", "--input", source, *arguments, *target])
        assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out.jsonl").exists()


def test_score_stops_when_too_much_fails(tmp_path):
    plugin = tmp_path / "p.py"
    plugin.write_text("def f(completions, **kwargs): raise RuntimeError('no')")
    source = rows_file(tmp_path, {**ROW, "completion": GOOD})
    result = runner.invoke(
        app, ["score", "--rewards", f"{plugin}:f", "--input", source, "--output", str(tmp_path / "o")]
    )
    assert result.exit_code == 2 and "1 of 1 scores failed" in result.stderr and "RuntimeError: no" in result.stderr


@pytest.mark.parametrize(("failing", "exit_code", "batch"), [(1, 0, 1), (2, 0, 1), (4, 2, 1), (4, 2, 100), (2, 0, 100)])
def test_score_goes_on_after_an_outage_and_compares_rows_of_one_id(tmp_path, monkeypatch, failing, exit_code, batch):
    """findings 14 and 19: a component may fail for a fifth of the rows; what it missed is null, beside 1 and 2."""
    monkeypatch.setattr("covo_rl.rewards.rows.BATCH", batch)
    plugin = tmp_path / "p.py"
    plugin.write_text(f"def f(completions, seat, **kw): return [float('nan') if s < {failing} else 1.0 for s in seat]")
    output, rows = tmp_path / "o", [{**ROW, "completion": GOOD, "seat": i, "id": "one"} for i in range(10)]
    rows[9]["completion"], rows[0]["id"] = "knock", "alone"
    words = ["--rewards", f"format,{plugin}:f", "--input", rows_file(tmp_path, *rows), "--output", str(output)]
    result = runner.invoke(app, ["score", *words])
    assert result.exit_code == exit_code, result.output
    if exit_code:
        assert f"{failing} of {10} scores failed" in result.stderr or "over the last 10 steps" in result.stderr
    elif batch == 100:
        totals = [json.loads(line)["reward_total"] for line in output.read_text().splitlines()]
        assert totals == [1.0, None, *[2.0] * 7, 1.0]


def test_try_explains(tmp_path):
    row = tmp_path / "row.json"
    row.write_text(json.dumps(ROW))
    result = runner.invoke(app, ["try", "accuracy", "format", "--completion", f"Hm {GOOD}", "--row", str(row)])
    assert result.exit_code == 0
    for line in ("grammar: text outside the blocks: 'Hm'", "the answer names 'bell', right is 'bell'", "accuracy: 1",
                 "format: 0", "total: 1"):  # fmt: skip
        assert line in result.output


@pytest.mark.parametrize(
    ("completion", "reasons"),
    [
        (GOOD, ["accuracy: 1  the answer names 'bell'; right is 'bell'", "format: 1  it follows the grammar",
                "consistency: 1  the reasoning commits to 'bell', the answer to 'bell'",
                "thinking: 0.8  without factual_correctness (a false claim"]),
        ("<think>bell or knock</think><answer>drum</answer>",
         ["accuracy: 0  the answer names no single option", "consistency: 0  the reasoning commits to no single option",
          "thinking: 0  echo: only words of the question and the options"]),
        ("<think>I hear wood, so a knock.</think>bell",
         ["accuracy: 0  there is no single answer block", "format: 0  no <answer> block",
          "consistency: 0  there is no reasoning or no answer", "without soundness (does not lead"]),
    ],
)  # fmt: skip
def test_try_says_why_each_component_gave_its_score(tmp_path, completion, reasons):
    """finding 44: one line of reason per component."""
    row = tmp_path / "row.json"
    row.write_text(json.dumps(ROW))
    result = runner.invoke(app, ["try", "--completion", completion, "--row", str(row)])
    said = " ".join(result.output.split()).replace(":", ": ").replace(":  ", ": ")
    for reason in reasons:
        assert " ".join(reason.split()) in said, result.output


def test_list_names_all_four():
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0 and all(
        name in result.output for name in ("accuracy", "format", "consistency", "thinking")
    )


@pytest.mark.parametrize(("code", "exit_code"), [("float('knock</answer>' in c)", 0), ("1.0", 1)])
def test_check_has_an_exit_code_for_ci(tmp_path, code, exit_code):
    plugin = tmp_path / "p.py"
    plugin.write_text(f"def f(completions, **kwargs): return [{code} for c in completions]")
    result = runner.invoke(app, ["check", f"{plugin}:f"])
    assert result.exit_code == exit_code and "junk: empty" in result.output
    assert ("FAIL" in result.output) == bool(exit_code)


def test_scores_of_any_kind_that_a_row_has_are_kept_and_compared(tmp_path):
    """finding 40: a row whose `rewards` hold text, a list or a flag was a traceback."""
    row = {"completion": "<answer>a</answer>", "choices": ["a", "b"], "answer": "a"}
    others = [{"accuracy": value} for value in ("high", [1], True, 1.0, 0.5, None)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "rewards": rewards}) + "\n" for rewards in others))
    command = ["score", "--rewards", "accuracy", "--input", str(path), "--output", str(tmp_path / "scored.jsonl")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "6 rows had scores, which are kept; 4 of them differ" in result.output
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [line["rewards"] for line in scored] == others


@pytest.mark.parametrize("choices", ["bell, knock", 5, {"A": "bell"}])
def test_choices_that_are_no_list_are_refused(tmp_path, choices):
    """finding 40: the characters of a text were taken as options, and a number was a traceback."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "r7", "completion": "<answer>b</answer>", "choices": choices, "answer": "b"}))
    command = ["score", "--rewards", "accuracy", "--input", str(path), "--output", str(tmp_path / "scored.jsonl")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "row r7: choices is" in result.stderr and not (tmp_path / "scored.jsonl").exists()


def test_reasons_reach_no_plugin_and_no_training(tmp_path):
    """finding 44: the wish for reasons went to every plugin as a column, and a data column `explain` asked for it."""
    plugin = tmp_path / "p.py"
    plugin.write_text(
        "def f(completions, log_extra, **columns):\n"
        "    log_extra('seen', [str((columns.get('explain'), columns.get('row_explain')))] * len(completions))\n"
        "    return [1.0] * len(completions)\n"
    )
    row = tmp_path / "row.json"
    row.write_text(json.dumps({**ROW, "explain": "mine"}))
    arguments = ["try", f"{plugin}:f", "accuracy", "--completion", GOOD, "--row", str(row)]
    said = runner.invoke(app, arguments).output
    assert "seen: (None, ['mine'])" in said and "the answer names 'bell'; right is 'bell'" in said
    groups = [group_from_completions(example_from_row({**ROW, "explain": "mine"}), [GOOD])]
    assert not [name for name in score(groups).extras if name.endswith("_reason")]


@pytest.mark.parametrize(
    ("rewards", "row", "completion", "reasons"),
    [
        (["format(pattern='loose')", "format"], ROW, f"Hm {GOOD}",
         ["loose'): 1  the pattern is there", "format: 0  text outside the blocks: 'Hm'"]),
        (["format(pattern='tags')"], ROW, "a</think>b<think><answer><answer>",
         ["tags'): 0.5  1 <think>, 1 </think>, 2 <answer>, 0 </answer>"]),
        (["accuracy(kind='text')"], ROW, GOOD, ["accuracy(kind='text'): 0  'A' against 'bell'"]),
        (["accuracy"], {**ROW, "question": "What rings?"}, "<answer>The bell rings.</answer>",
         ["accuracy: 1  the answer names 'bell'; right is 'bell'"]),
        (["accuracy"], {"answer": "440 Hz"}, "<answer>441 Hz</answer>", ["accuracy: 0  '441 Hz' against '440 Hz'"]),
        (["accuracy"], {"answer": "b" * 500}, f"<answer>{'a' * 500}</answer>", [f"'{'a' * 79} against '{'b' * 79}"]),
    ],
)  # fmt: skip
def test_a_reason_is_true_short_and_of_its_own_component(tmp_path, rewards, row, completion, reasons):
    """finding 44: two of one kind, a forced kind, a restated question, rows without options, long texts."""
    path = tmp_path / "row.json"
    path.write_text(json.dumps(row))
    result = runner.invoke(app, ["try", *rewards, "--completion", completion, "--row", str(path)])
    said = " ".join(result.output.split())
    for reason in reasons:
        assert " ".join(reason.split()) in said, result.output
