"""The linter finds what would ruin a run, and our own rewards pass it."""

import pytest

from covo_rl.config import RewardConfig
from covo_rl.prompt import parse
from covo_rl.rewards import lint
from covo_rl.rewards.columns import example_from_row
from covo_rl.rewards.linter import CASES, GOLD, gold_completion
from covo_rl.rewards.worker import close

BAD = '''
import random, time
def pays_for_nothing(completions, **kwargs): return [1.0] * len(completions)
def pays_for_empty(completions, **kwargs): return [10.0 if not c else 1.0 for c in completions]
def moody(completions, **kwargs): return [random.random() for c in completions]
def harsh(completions, **kwargs): return [0.25 * bool(c.strip()) for c in completions]
def brittle(completions, **kwargs): return [float(len(c[:1]) / len(c) > 0) for c in completions]
def slow(completions, **kwargs):
    time.sleep(0.005 * len(completions))
    return [float("knock</answer>" in c) for c in completions]
def fine(completions, **kwargs): return [float(c.endswith("knock</answer>")) for c in completions]
'''  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    file = tmp_path_factory.mktemp("bad") / "bad.py"
    file.write_text(BAD)
    yield lambda name: f"{file}:{name}"
    close()


def test_our_rewards_pass_the_full_check():
    assert lint("accuracy,format,consistency,thinking", full=True) == []


def test_a_reward_that_reads_replies_whole_is_asked_about_whole_replies():
    assert lint("accuracy(part='text')", full=True) == []
    row = {"id": "r", "question": "?", "answer": "one two"}
    assert lint("accuracy(part='text')", [example_from_row(row)]) == []


def test_there_are_enough_cases_and_they_differ():
    assert len(CASES) >= 60 and len({case.completion for case in CASES}) == len(CASES)
    assert parse(GOLD).ok and CASES[0].completion == GOLD


@pytest.mark.parametrize(
    ("name", "checks"),
    [("pays_for_nothing", {"junk"}), ("pays_for_empty", {"junk", "range"}), ("moody", {"determinism", "gold"}),
     ("harsh", {"gold"}), ("brittle", {"odd input"}), ("slow", {"speed"}), ("fine", set())],
)  # fmt: skip
def test_bad_rewards_are_found(bad, name, checks, monkeypatch):
    if name == "slow":
        monkeypatch.setattr("covo_rl.rewards.linter.SPEED", 0.004)
    found = {finding.check for finding in lint([bad(name)], full=True)}
    assert checks <= found and (checks or not found)


def test_every_score_out_of_range_is_said(bad):
    """finding 16, its neighbour: the check stopped at the first."""
    file = bad("x").partition(":")[0]
    with open(file, "a") as lines:
        lines.write("def wild(completions, **kwargs): return [5.0 - 6.0 * (i % 2) for i in range(len(completions))]\n")
    found = [finding.what for finding in lint([bad("wild")], full=True) if finding.check == "range"]
    assert len(found) == len(CASES) and sum("5 is outside" in what for what in found) == (len(CASES) + 1) // 2


def test_the_short_form_takes_a_config_and_rows(bad):
    rows = [example_from_row({"id": i, "question": "Who?", "choices": ["Male, 30s", "Female, 30s"], "answer": a})
            for i, a in enumerate(["Male, 30s", "B"])]  # fmt: skip
    assert lint(RewardConfig(), rows) == []
    rows.append(example_from_row({"id": "typo", "question": "Who?", "choices": ["Male"], "answer": "Mael"}))
    assert [str(finding) for finding in lint(RewardConfig(rewards="accuracy"), rows)] == [
        "reward accuracy: gold: row typo is the row's answer 'Mael' is missing or not one of its options"
    ]
    assert {finding.check for finding in lint([bad("pays_for_nothing"), bad("brittle")])} == {"junk", "odd input"}


def test_the_gold_completion_uses_the_evidence_of_the_row():
    row = {"question": "?", "choices": ["a b", "c d"], "answer": "c d", "evidence": "I hear c d."}
    assert gold_completion(example_from_row(row)) == "<think>I hear c d.</think><answer>c d</answer>"
    assert parse(gold_completion(example_from_row({**row, "evidence": None}))).ok
