"""The monitor's rules: each fires on its history, none on a healthy one, and none twice for what lasts."""

import functools
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from covo_rl.config import Options, option_names
from covo_rl.records.folder import Run
from covo_rl.records.monitor import Advice, Monitor, advice
from covo_rl.records.rules import PAGE, RULES
from covo_rl.records.signs import LONGEST

ROOT = Path(__file__).parent.parent
DEMO = Path(__file__).parent / "fixtures" / "demo_metrics.jsonl"
NAMES = [rule.name for rule in RULES]


def healthy(steps=60):
    """A run that learns: 256 rollouts a step, accuracy from 30 to 80 %."""
    return [
        {
            "step": step, "kl": 0.002 * step, "grad_norm": 0.1, "learning_rate": 1e-3, "skipped_steps": 0,
            "sampling/sampling_logp_difference/mean": 0.005, "sampling/entropy": 0.2 - 0.002 * step,
            "reward_accuracy": 0.3 + step / 120, "none_accuracy": 0.0, "failed_accuracy": 0.0,
            "reward_format": min(0.7 + step / 60, 1.0), "none_format": 0.0, "failed_format": 0.0,
            "reward_thinking": 0.6 + step / 200, "none_thinking": 0.01, "failed_thinking": 0.0,
            "reward_total": 1.6 + step / 40, "none_total": 0.01, "zero_variance_groups": step / 120,
            "truncated": 0.02, "thinking_words": 11.0 - step / 30, "rewards/wrong_outranks_right": 0.05,
            "seconds": {"step": 10.0, "prompt": 0.1, "encode": 0.5, "sample": 5.0, "reward": 0.2, "update": 4.0,
                        "reward_accuracy": 0.1, "reward_thinking": 0.2},
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip


def changed(**columns):
    """The healthy run with columns replaced: by a value, or by a function of the step."""
    rows = healthy()
    for row in rows:
        row.update({name: value(row["step"]) if callable(value) else value for name, value in columns.items()})
    return rows


def waiting(step=10.0, **phases):
    return [{**row, "seconds": {**row["seconds"], "step": step, **phases}} for row in healthy()]


#: rule -> a history of which it says something, and nothing else does; and a figure that its sentence names
CASES = {
    "format_never_rises": (changed(reward_format=0.1), "0.10"),
    "all_groups_right": (changed(reward_accuracy=0.98, zero_variance_groups=0.95), "accuracy is 98%"),
    "all_groups_wrong": (changed(reward_accuracy=0.01, zero_variance_groups=0.95), "accuracy is 1%"),
    "deviation_nil": (changed(reward_accuracy=0.5, zero_variance_groups=0.97), "97%"),
    "kl_runs_away": (changed(kl=lambda step: 0.002 * math.exp(step / 8)), "0.34 a token"),
    "engine_mismatch": (changed(**{"sampling/sampling_logp_difference/mean": lambda step: 0.004 * step}), "0.064 nats"),
    "rollouts_off_policy": (changed(**{"engine/kl_k3": 0.002, "engine/ess": lambda step: 1 - step / 100}), "79% of"),
    "entropy_collapses": (changed(**{"sampling/entropy": lambda step: 0.3 * math.exp(-step / 10)}), "0.027 nats"),
    "completions_hit_the_limit": (changed(truncated=lambda step: step / 60), "max_completion_length 1024"),
    "thinking_shrinks": (changed(thinking_words=lambda step: max(11.0 - step / 4, 0.0)), "2.5 words"),
    "component_farmed": (changed(reward_accuracy=lambda step: 0.6 - step / 120), "R_format rose from"),
    "stops_listening": (changed(listen_real=0.41, listen_silent=0.4), "accuracy is 40%, with the clip 41%"),
    "component_missing": (changed(none_thinking=0.8, none_total=0.8, reward_thinking=None), "80% of the rollouts"),
    "judge_fails": (changed(failed_thinking=0.1, none_thinking=0.1), "10% of the scores of thinking"),
    "majority_collapses": (
        changed(majority_unanimous=0.95, zero_variance_groups=0.95, reward_accuracy=None),
        "there is no key",
    ),
    "updates_skipped": (changed(skipped_steps=lambda step: 2 * (step > 30)), "2 optimiser update(s)"),
    "wrong_outranks_right": (changed(**{"rewards/wrong_outranks_right": 0.3}), "30% of the pairs"),
    "gradient_always_clipped": (changed(grad_norm=4.0), "max_grad_norm 1.0"),
    "learning_rate_zero": (changed(learning_rate=lambda step: 1e-3 * (step < 20)), "learning rate is 0"),
    "gradient_nil": (changed(grad_norm=0.0), "exactly 0"),
    "one_phase_dominates": (waiting(step=20.0, reward=12.0, reward_thinking=11.9), "most of it reward_thinking"),
}  # fmt: skip


def test_every_rule_has_a_case():
    assert sorted(CASES) == sorted(NAMES) and len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_speaks_once_of_a_history_that_has_its_condition(name):
    history, figure = CASES[name]
    said = [piece for piece in advice(history) if piece.rule == name]
    assert len(said) == 1, "once, although the condition lasts"
    assert figure in said[0].text and said[0].link == f"{PAGE}#{name}" and 1 <= said[0].step <= 60


@pytest.mark.parametrize("name", NAMES)
def test_no_other_rule_speaks_of_it(name):
    # agreement without a key cannot be told from rewards that do not differ; a solved set is both
    beside = {"majority_collapses": {"deviation_nil"}}
    assert {piece.rule for piece in advice(CASES[name][0])} - {name} == beside.get(name, set())


def test_nothing_is_said_of_a_healthy_run():
    assert advice(healthy()) == []
    assert advice(changed(listen_real=0.6, listen_silent=0.3)) == []


@functools.cache
def demo():
    return [json.loads(line) for line in DEMO.read_text().splitlines()]


def test_nothing_is_said_of_the_demo():
    """The real thing: 120 steps of the shipped configuration, with --listen-every 10."""
    rows = demo()
    assert len(rows) == 120 and sum("listen_real" in row for row in rows) == 12
    assert advice(rows, {"max_steps": 120, "max_completion_length": 48, "num_generations": 8}) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_columns_of_a_rule_are_columns_of_a_real_run(name):
    """A metric that is renamed would silence its rule."""
    row = demo()[9]
    present = {
        *row,
        *(f"seconds/{phase}" for phase in row["seconds"]),
        "majority_unanimous",
        "majority_right",
        "listen_rows",
    }
    (rule,) = [rule for rule in RULES if rule.name == name]
    # with beta alone: tests/test_monitor_runs.py; younger than the demo's run: tests/test_correction.py
    optional = {"kl", "engine/kl_k3", "engine/ess"}
    for column in {*rule.columns.split()} - optional:
        pattern = re.compile(re.escape(column).replace(r"\*", ".+") + "$")
        assert any(pattern.match(key) for key in present), column


def test_a_condition_is_said_again_only_after_it_was_gone_for_long_enough():
    def truncated(step):
        return 0.9 if step <= 10 or 20 <= step <= 25 or step > 50 else 0.0

    said = advice(changed(truncated=truncated))
    assert [piece.step for piece in said] == [5, 52], "a pause of ten steps is not gone, one of twenty-five is"


def test_two_components_that_fail_are_two_pieces_of_advice():
    history = changed(failed_thinking=0.1, failed_format=lambda step: 0.2 * (step > 20))
    said = [(piece.step, re.findall(r"scores of (\w+)", piece.text)) for piece in advice(history)]
    assert said == [(5, ["thinking"]), (22, ["format"])]


def test_the_options_of_the_run_are_those_of_the_sentence():
    history, _ = CASES["completions_hit_the_limit"]
    (piece,) = advice(history, {"max_completion_length": 48})
    assert "--max_completion_length 48" in piece.text
    (piece,) = advice(CASES["gradient_always_clipped"][0], {"max_grad_norm": 2.0})
    assert "max_grad_norm 2.0" in piece.text
    assert advice(CASES["gradient_always_clipped"][0], {"max_grad_norm": 0}) == [], "0 is off"


def test_majority_with_a_key_is_a_collapse_only_where_accuracy_falls():
    solved = changed(majority_unanimous=0.95, zero_variance_groups=0.95, reward_accuracy=0.95)
    assert {piece.rule for piece in advice(solved)} == {"all_groups_right"}
    for column in ("reward_accuracy", "majority_right"):
        columns = {"reward_accuracy": None, column: lambda step: 0.7 if step < 20 else 0.5}
        fallen = changed(majority_unanimous=0.95, **columns)
        (piece,) = [piece for piece in advice(fallen) if piece.rule == "majority_collapses"]
        assert "accuracy fell from 70% to" in piece.text and piece.step > 20


def test_a_fall_of_accuracy_within_its_noise_is_none():
    """Four prompts a step: accuracy is 0.6 then 0.48 in the mean, and 0.3 up or down from step to step."""
    noisy = changed(reward_accuracy=lambda step: (0.6 if step <= 20 else 0.48) + (0.3 if step % 2 else -0.3))
    assert advice(noisy) == []
    clear = changed(reward_accuracy=lambda step: (0.6 if step <= 20 else 0.48) + (0.03 if step % 2 else -0.03))
    assert {piece.rule for piece in advice(clear)} == {"component_farmed"}


def test_entropy_that_falls_because_the_questions_are_solved_is_no_collapse():
    history = changed(**{"sampling/entropy": lambda step: 0.3 * math.exp(-step / 10)}, reward_accuracy=0.85)
    assert advice(history) == []


@pytest.mark.parametrize("name", NAMES)
def test_line_by_line_says_the_same(name):
    history, monitor = CASES[name][0], Monitor()
    assert [piece for row in history for piece in monitor.see(row)] == advice(history)


HOLES = [None, float("nan"), float("inf"), "text", [1], {"a": 1}, True, 10**400]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_is_no_evidence(name):
    """In whole columns, in single places, in all places; a history of one line, of none, of lines without a step."""
    history = CASES[name][0]
    (rule,) = [rule for rule in RULES if rule.name == name]
    for i, column in enumerate({"step", "seconds", *rule.columns.split()} & {*history[0]}):
        advice([{**row, column: HOLES[i % len(HOLES)]} for row in history])
    mixed = [{column: HOLES[(row["step"] + i) % 99] if (row["step"] + i) % 99 < len(HOLES) else value
              for i, (column, value) in enumerate(row.items())} for row in history]  # fmt: skip
    assert {piece.rule for piece in advice(mixed)} <= {name, "deviation_nil", "updates_skipped"}
    for hole in HOLES:
        assert advice([dict.fromkeys(row, hole) for row in history]) == []
    assert advice(history[:1]) == advice([]) == advice([{}, {"loss": 1.0}]) == []


def test_a_resumed_history_that_goes_back_or_begins_late_is_read_on():
    history, _ = CASES["thinking_shrinks"]
    again = history[:40] + history[5:]
    assert [piece.step for piece in advice(again)] == [36, 36], "after going back it was gone, and came again"
    assert advice(history[50:]) == [], "there is nothing to compare with"
    assert advice(healthy()[30:]) == []


def test_advice_is_data_whatever_a_component_is_called():
    name = "{0.__class__}<script>\x1b[31m"
    history = changed(**{f"reward_{name}": 0.5, f"none_{name}": 0.9, f"failed_{name}": 0.0}, none_total=0.9)
    (piece,) = advice(history)
    assert name in piece.text and isinstance(piece, Advice)


def test_the_cost_of_a_step_does_not_grow_with_the_history():
    """2,000 steps: what is remembered is bounded, and the last hundred take no longer than the first (times four)."""
    monitor, rows = Monitor(), [{**row, "step": i} for i, row in enumerate(healthy() * 34)]
    times = []
    for start in range(100, 2000, 100):
        for row in rows[start - 100 if start == 100 else start : start]:
            monitor.see(row)
        begun = time.process_time()
        for row in rows[start : start + 100]:
            monitor.see(row)
        times.append(time.process_time() - begun)
    assert max(len(values) for values in monitor.past.recent.values()) == LONGEST
    assert min(times[-3:]) < 4 * min(times[:3])
    assert min(times) / 100 < 0.02 * 0.5, "under 2 % of a step of half a second, the fastest that the demo has"


def test_recording_a_step_does_not_read_what_was_recorded(tmp_path, monkeypatch):
    """2,000 steps: the CPU time of appending stays as it was (times four), and the monitor is not fed from the file."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    run, rows, times = Run(tmp_path), healthy(), []
    for start in range(0, 2000, 100):
        begun = time.process_time()
        for step in range(start, start + 100):
            run.log_metrics({**rows[step % 60], "step": step})
        times.append(time.process_time() - begun)
    assert len(run.metrics()) == 2000 and min(times[-3:]) < 4 * min(times[:3])


def test_reading_advice_needs_no_torch():
    code = "import sys, covo_rl.records.monitor as m; m.advice([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_every_rule_has_its_section_and_the_page_has_no_other():
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert re.findall(r"^### `(\w+)`$", page, re.MULTILINE) == NAMES
    sections = re.split(r"^##+ .*$", page, flags=re.MULTILINE)
    assert all(len(section.split()) > 25 for section in sections[-len(NAMES) :])


def test_the_numbers_that_the_page_says_are_those_of_the_table():
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    for rule in RULES:
        (line,) = re.findall(rf"^### `{rule.name}`\n\n(Looks at .*)$", page, re.MULTILINE)
        columns = set(re.findall(r"`([^`]+)`", line.partition(":")[0]))
        assert columns == {*rule.columns.split()}, rule.name
        said = {name: float(value) for name, value in re.findall(r"`(\w+)` (\d+(?:\.\d+)?)", line.partition(":")[2])}
        assert said == {name: float(value) for name, value in rule.numbers.items()}, rule.name


def test_the_messages_that_the_page_explains_are_those_of_the_code():
    page = (ROOT / PAGE).read_text(encoding="utf-8").split("## While it trains")[0]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "covo_rl").rglob("*.py"))
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 10 and [message for message in messages if message not in sources] == []


def test_the_columns_of_a_run_are_explained():
    page = (ROOT / PAGE).read_text(encoding="utf-8").partition("## Columns of metrics.jsonl")[2].partition("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}
    patterns = [re.compile(re.escape(name).replace("NAME", r"\w+").replace(r"\.\.\.", ".+") + "$") for name in named]
    more = {f"sampling/{kind}/{part}" for kind in ("sampling_logp_difference", "importance_sampling_ratio")
            for part in ("min", "mean", "max")}  # fmt: skip
    columns = {column for row in demo() for column in row}
    assert [c for c in columns - more if not any(pattern.match(c) for pattern in patterns)] == []


def test_every_option_and_command_that_a_sentence_names_exists():
    from test_docs import known_flags, parses

    flags = {f"--{name}".replace("_", "-") for name in option_names()} | known_flags()
    for rule in RULES:
        named = re.findall(r"--[a-z][\w-]*", rule.text)
        assert {flag.replace("_", "-") for flag in named} <= flags, rule.name
        for command in re.findall(r"`(covo-rl [^`]+)`", rule.text):
            parses(command)
        texts = dict.fromkeys(rule.numbers, 0) | Options().flat()
        assert len(rule.text.split(". ")) >= 2 or ": " in rule.text, "what is seen, then what to do"
        assert {*re.findall(r"\{(\w+)", rule.text)} - {*texts} <= {
            "now", "start", "count", "alike", "accuracy", "component", "before", "after", "then", "real", "silent",
            "name", "agreement", "known", "new", "least", "share", "step", "seconds", "part", "reading", "effect",
        }  # fmt: skip
