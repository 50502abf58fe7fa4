"""What a run shows while it goes on: bars that fit, the time left, three rollouts, the next commands."""

import io
import re
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from covo_rl.data.terminal import Terminal
from covo_rl.records import console
from covo_rl.records.console import Figures, column_names, legend, step_figures, time_left, working
from covo_rl.records.samples import sample_text, step_samples, three_of
from covo_rl.records.steps import StepRecord

METRICS = {
    "reward_total": 2.1501, "reward_accuracy": 0.2651, "reward_format": 0.7, "reward_consistency": 0.5,
    "reward_./mine.py:brevity": None, "completion_length": 31.4, "zero_variance_groups": 0.125, "loss": 1.0,
}  # fmt: skip


def screen(width, *, terminal=True):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def lines_of(text):
    return [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n") if line]


def test_the_figures_of_a_step_are_rounded_and_named():
    assert str(step_figures(METRICS)) == (
        "R 2.15  accuracy 0.27  format 0.70  consistency 0.50  brevity -  length 31  same 12%"
    )
    measured = {"eval_accuracy": 0.62, "eval/mmar/accuracy": 0.41, "eval/mmar/n": 1000, "eval/asr/n": 2}
    assert list(step_figures({**METRICS, **measured}))[-4:-2] == [("held-out", "62%"), ("mmar", "41%")]


@pytest.mark.parametrize("width", range(0, 120, 7))
def test_figures_fit_any_width_and_lose_no_digit(width):
    figures = Figures([("R", "2.15"), ("accuracy", "0.27"), ("\u65e5\u672c\u8a9e\u5831", "0.70"), ("same", "12%")])
    text = figures.within(width)
    assert cell_len(text) <= width
    values = [piece.split()[-1] for piece in text.split("  ") if piece]
    assert values == ["2.15", "0.27", "0.70", "12%"][: len(values)]
    assert figures.within(200) == str(figures)


def test_columns_are_named_by_what_tells_them_apart():
    names = ["accuracy", "thinking(use_gold=False)", "./a.py:score", "./b.py:score", "package.mod:brevity"]
    assert list(column_names(names).values()) == ["accuracy", "thinking", "./a.py:score", "./b.py:score", "brevity"]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_bar_never_wraps_and_shows_count_reward_and_bar(width, monkeypatch):
    shown = screen(width)
    monkeypatch.setattr(console, "console", shown)
    with console.ProgressDisplay("GRPO", 1200, steps=5) as display:
        display.update(700, step_figures(METRICS))
        display.bar.refresh()
        with console.ProgressDisplay("step 700, greedy", 400) as inner:
            inner.rated(380, 400, 0.6251)
            display.bar.refresh()
    lines = lines_of(shown.file.getvalue())
    assert max(map(cell_len, lines)) <= width
    (bar, inner) = next(line for line in lines if "R 2.15" in line), next(line for line in lines if "380/400" in line)
    assert " 700/1200" in bar and "accu" in bar and ("━" in bar) == (width >= 70)
    assert "62.5 % right" in inner and lines[-1].startswith("GRPO"), "the inner line is gone at the end"


def test_the_time_left_of_steps_that_take_minutes(monkeypatch):
    """rich forgets steps older than half a minute, and says -:-- for ever."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    shown = screen(80)
    monkeypatch.setattr(console, "console", shown)
    with console.ProgressDisplay("GRPO", 10, done=2) as display:
        for step in (3, 4, 5):  # 100 s each: 5 are left
            now[0] += 100
            display.update(step, "R 1")
        now[0] += 20
        display.bar.refresh()
    assert " 8:00 " in shown.file.getvalue()
    assert time_left((2, 0.0), 5, 10, 300.0) == "8:20 left"


def test_a_log_file_has_a_line_for_slow_steps_too_and_says_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    shown = screen(80, terminal=False)
    monkeypatch.setattr(console, "console", shown)
    with console.ProgressDisplay("GRPO", 100, steps=50) as display:
        for step in range(1, 5):
            now[0] += 40
            display.update(step, step_figures(METRICS))
    lines = lines_of(shown.file.getvalue())
    assert [line.split()[1] for line in lines] == ["1/100", "3/100"], "the first, then one a minute"
    assert lines[0].endswith("same 12%  1:06:00 left") and "accuracy 0.27" in lines[0], "long lines are not wrapped"


def test_work_without_steps_is_said_only_where_it_takes_long(monkeypatch):
    shown = screen(80, terminal=False)
    monkeypatch.setattr(console, "console", shown)
    with working("quick [bold]"):
        pass
    monkeypatch.setattr(console, "SILENT_SECONDS", 0.02)
    with working("self-check \x1b[31m[bold]x"):
        time.sleep(0.2)
    assert shown.file.getvalue().count("\n") == 1 and "\x1b" not in shown.file.getvalue()
    with pytest.raises(KeyError), working("fails"):
        raise KeyError
    on_screen = screen(80)
    monkeypatch.setattr(console, "console", on_screen)
    with working("export [bold]"):
        time.sleep(0.15)
    assert "export [bold] 0:00:00" in on_screen.file.getvalue()


def test_the_legend_names_every_column(monkeypatch):
    shown = screen(80, terminal=False)
    shown.print(legend(["accuracy", "format"]))
    assert {"R", "accuracy", "length", "same"} <= {line.split()[0] for line in lines_of(shown.file.getvalue())}


def row(name, total, completion="<think>I hear it.</think><answer>yes</answer>", **columns):
    rewards = {"accuracy": total, "format": None}
    return {"id": name, "question": f"question {name}?", "choices": ["yes", "no"], "answer": "yes", "rewards": rewards,
            "completion": completion, "stop_reason": "stop", "reward_total": total, **columns}  # fmt: skip


def test_best_median_and_worst_of_a_step_by_other_questions_where_some_are_as_good():
    rows = [row(name, total) for name, total in [("a", 2.0), ("a", 2.0), ("b", 2.0), ("b", 1.0), ("c", 1.0), ("c", 0.0),
                                                 ("a", 0.0), ("b", None)]]  # fmt: skip
    picks = three_of(rows)
    assert [(name, pick["reward_total"]) for name, pick in picks] == [("best", 2.0), ("median", 1.0), ("worst", 0.0)]
    assert len({pick["id"] for _, pick in picks}) == 3
    assert [name for name, _ in three_of(rows[:2])] == ["best", "worst"]
    assert [name for name, _ in three_of(rows[:1])] == ["best"] and three_of([]) == []
    assert [pick["id"] for _, pick in three_of([row("x", None)])] == ["x"], "not gradeable is better than nothing"


def test_a_rollout_is_shown_with_verdict_and_says_what_it_cuts(tmp_path):
    words = " ".join(f"word{i}" for i in range(400))
    text = sample_text(
        "best", row("a", 1.0, f"<think>{words}</think><answer>no</answer>"), tmp_path / "x.jsonl", width=60
    )
    lines = text.plain.split("\n")
    assert lines[0] == "best  R 1.00  accuracy 1.00  format -"
    assert lines[1:4] == ["  question  question a?  [yes | no]", "  key       yes", "  answer    no"]
    assert sum("word" in line for line in lines) == 4 and lines[-2].strip() == "..."
    assert "is cut, whole in" in lines[-1] and max(map(len, lines[:-1])) <= 60
    assert "kept nowhere" in sample_text("best", row("a", 1.0, words), None).plain
    broken = sample_text("worst", row("a", 0.0, "<answer>no"), None).plain
    assert "said      <answer>no" in broken and "no <think> block" in broken, "what does not parse is shown as it is"


@pytest.mark.parametrize("evil", ["\x1b[31mred\x1b]0;t\x07", "[bold]x[/bold]", "a\u202eb", "\ud83d", ":bomb:"])
def test_no_rollout_drives_the_terminal(evil, capsys):
    rows = [row(evil, 1.0, f"<think>{evil}</think><answer>{evil}</answer>", question=evil, choices=[evil], answer=evil)]
    for text in step_samples(StepRecord(1, {}, rows), None):
        Terminal(width=80).print(text)
    out = capsys.readouterr().out
    assert not [char for char in ("\x1b", "\x07", "\u202e", "\ud83d", "\N{BOMB}") if char in out]


def test_the_next_commands_are_quoted_for_the_shell(tmp_path):
    import shlex

    from covo_rl.config import Options
    from covo_rl.run.result import next_commands
    from covo_rl.types import Clip, Example

    options = Options()
    options.data.data, options.data.eval_data = "rows.json", "my rows.json"
    folder = tmp_path / "my $run"
    rows = [Example("1", (Clip(path="it's.wav"),), "How many; and `why`?", ("one", "two words"), "one")]
    commands = [shlex.split(line) for line in next_commands(options, folder, folder / "adapter", rows)]
    assert [words[:2] for words in commands] == [["covo-rl", w] for w in ("report", "generate", "eval", "export")]
    assert commands[1][-6:] == ["--question", "How many; and `why`?", "--choice", "one", "--choice", "two words"]
    assert str(folder / "adapter") in commands[2] and commands[2][2:6] == ["--set", "own", "--data", "my rows.json"]
    options.data.data, options.adapter.lora = None, False
    commands = [shlex.split(line) for line in next_commands(options, folder, folder / "model")]
    assert [words[1] for words in commands] == ["report", "generate", "eval"]
    assert commands[2][2:6] == ["--set", "builtin", "--model", str(folder / "model")]


def test_after_a_spoken_run_the_sound_alone_asks_and_the_whole_reply_is_the_answer(tmp_path):
    import shlex

    from covo_rl.config import parse_options
    from covo_rl.run.defaults import with_defaults
    from covo_rl.run.result import next_commands
    from covo_rl.types import Clip, Example

    options = parse_options(with_defaults(["--model", "builtin:tiny_spoken", "--eval-data", "others.jsonl"]))
    rows = [Example("1", (Clip(path="a.wav"),), "Say it again.", answer="one")]
    _, asking, evaluating = map(shlex.split, next_commands(options, tmp_path, tmp_path / "model", rows))
    assert asking[1:] == ["chat", "--model", str(tmp_path / "model"), "--audio", "a.wav", "--speak", "reply.wav"]
    assert evaluating[2:8] == ["--set", "own", "--data", "others.jsonl", "--rewards", "accuracy(part='text')"]
