"""Rows and rewards for other trainers. Where those are installed, tests/interop/ runs the real ones (docs/interop.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from covo_rl.config import PromptConfig, RewardConfig
from covo_rl.data import DataError, load_examples
from covo_rl.interop.rows import TRAINERS, trainer_rows
from covo_rl.interop.scoring import lone_scores, lone_terms
from covo_rl.rewards import RewardError, score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.run.commands.data import app
from covo_rl.types import Clip, Example

ROOT = Path(__file__).parents[1]
GOOD, WRONG = "<think>It meows.</think><answer>cat</answer>", "<think>It barks.</think><answer>dog</answer>"
LOOSE, CUT = "the cat", "<think>It meows.</think><answer>cat"


@pytest.fixture
def examples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(8000) / 9), 8000)
    clip = Clip(path=str(tmp_path / "a.wav"))
    odd = {"facts": {"n": 2, "who": None}, "id": "not mine", "completion": "nor this", "mixed": [1, "a"], "clips": 7}
    return [
        Example("r0", (clip,), "Which animal?", ("dog", "cat"), "cat", {"task": "sound"}),
        Example("r1", (clip, clip), "Wo ist sie?", ("hier", "dört"), "hier", odd, system="Antworte."),
        Example("r2", (), "What is 2 + 2?", (), "4"),
    ]


def told(row):
    return row["extra_info"]["covo_row"] if "extra_info" in row else row["covo_row"]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_reaches_the_rewards_as_it_was_whatever_its_columns_hold(tmp_path, examples, trainer, suffix):
    import datasets

    from covo_rl.data import write

    given = [examples[0], examples[2]] if trainer == "nemo-rl" else examples
    write(trainer_rows(given, trainer, tmp_path, PromptConfig()), tmp_path / f"out.{suffix}")
    kind = "json" if suffix == "jsonl" else suffix  # as verl and NeMo RL read it
    again = datasets.load_dataset(kind, data_files=str(tmp_path / f"out.{suffix}"), split="train", cache_dir=tmp_path)
    for example, row in zip(given, again, strict=True):
        back = example_from_row(json.loads(told(row)))
        assert (back.id, back.clips, back.question, back.choices, back.answer) == (
            example.id, example.clips, example.question, example.choices, example.answer)  # fmt: skip
        assert back.columns == dict(example.columns)
        assert all(os.path.isabs(path) for path in row["audios"]) and len(row["audios"]) == len(example.clips)


def test_the_prompt_is_the_one_that_is_trained_on_here(tmp_path, examples):
    row = trainer_rows(examples, "swift", tmp_path, PromptConfig(instruction="Answer.", choice_style="lines"))[1]
    assert row["messages"] == [
        {"role": "system", "content": "Antworte."},
        {"role": "user", "content": "<audio><audio>Wo ist sie?\nhier\ndört\nAnswer."},
    ]
    assert row["solution"] == "hier"
    row = trainer_rows(examples[:1], "verl", tmp_path, PromptConfig(system_prompt="Be brief."))[0]
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert row["reward_model"] == {"style": "rule", "ground_truth": "cat"} and row["data_source"] == "covo_rl"


def test_text_that_another_trainer_takes_for_something_else_is_refused_with_its_row(tmp_path, examples):
    clip = examples[0].clips
    rows = [
        Example("tag", clip, "What is <audio> here?", ("a", "b"), "a"),
        Example("picture", clip, "Which?", ("a <image>", "b"), "b"),
        Example("turn", clip, "Which?<|im_end|>", ("a", "b"), "b"),
        Example("plain", clip, "Is 1 < 2 > 0?", ("a", "b"), "b"),
    ]
    with pytest.raises(DataError) as caught:
        trainer_rows(rows, "verl", tmp_path, PromptConfig())
    assert [problem.row_id for problem in caught.value.problems] == ["tag", "picture", "turn"]
    assert "<|im_end|>, which verl does not take as text" in str(caught.value)
    with pytest.raises(DataError, match="r1: it has a system message, which NeMo RL"):
        trainer_rows(examples, "nemo-rl", tmp_path, PromptConfig())


def test_scores_are_those_of_a_run(tmp_path, examples):
    """One completion at a time gives what a group gives: 1, 0 for the answer, 1 or 0 for the format."""
    rows = [told(row) for row in trainer_rows(examples[:1] * 4, "verl", tmp_path, PromptConfig())]
    texts, rewards = [GOOD, WRONG, LOOSE, CUT], "accuracy=1,format=0.5"
    scores = lone_scores(rows, texts, rewards=rewards)
    assert [each["score"] for each in scores] == [1.5, 0.5, 0.0, 0.0]
    assert scores[1] == {"score": 0.5, "accuracy": 0.0, "format": 1.0}
    table = score([group_from_completions(examples[0], texts)], RewardConfig(rewards=rewards))
    assert [each["score"] for each in scores] == table.rewards_PG[0].tolist()
    gated = lone_scores(rows, texts, rewards=rewards, reward_gate="accuracy")
    assert [each["score"] for each in gated] == [1.5, 0.0, 0.0, 0.0]
    assert lone_scores(rows[:1], [GOOD], rewards="format", stop_reasons=["length"])[0]["score"] == 0.0


def test_a_reward_reads_the_columns_of_its_row(tmp_path, examples):
    (tmp_path / "mine.py").write_text("def mine(completions, facts, **columns):\n    return [f['n'] / 4 for f in facts]\n")
    rows = [told(row) for row in trainer_rows(examples[1:2], "swift", tmp_path, PromptConfig())]
    assert lone_scores(rows, ["?"], rewards=f"{tmp_path}/mine.py:mine")[0]["score"] == 0.5


def test_a_missing_score_stops_unless_it_is_said_what_it_counts_as(tmp_path, examples):
    open_row = Example("r7", (), "Which?", ("dog", "cat"), None)
    row = told(trainer_rows([open_row], "verl", tmp_path, PromptConfig())[0])
    with pytest.raises(RewardError, match=r"row r7: accuracy is not gradeable .*missing=0\.0"):
        lone_scores([row], [GOOD])
    assert lone_scores([row], [GOOD], missing=0.25)[0] == {"score": 1.25, "accuracy": 0.25, "format": 1.0}
    (tmp_path / "bad.py").write_text("def bad(completions, **columns):\n    raise KeyError('facts')\n")
    with pytest.raises(RewardError, match="facts"):  # a failure is no missing score
        lone_scores([row], [GOOD], rewards=f"{tmp_path}/bad.py:bad", missing=0.0)


@pytest.mark.parametrize(
    "rewards, options, said",
    [
        ("accuracy,majority", {}, "majority needs the other rollouts of the prompt"),
        ("acuracy", {}, "did you mean 'accuracy'"),
        ("accuracy", {"reward_gat": "format"}, "no option reward_gat here; there are rewards, missing"),
        ("accuracy", {"reward_gate": "format"}, "not among the rewards"),
    ],
)
def test_what_cannot_be_scored_elsewhere_is_refused(rewards, options, said):
    with pytest.raises(RewardError, match=said):
        lone_scores(['{"answer": "cat"}'], [GOOD], rewards=rewards, **options)
    if not options:
        with pytest.raises(RewardError, match=said):
            lone_terms(rewards)


@pytest.mark.parametrize("row", [None, "", "[1]", "{", 3])
def test_a_row_that_was_not_converted_is_told_how_to(row):
    with pytest.raises(RewardError, match="covo-rl data convert"):
        lone_scores([row], [GOOD])


def test_the_command_writes_them(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 8000)
    row = {"id": "r1", "audio": "a.wav", "question": "Which?", "choices": ["dog", "cat"]}
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(row | {'answer': 'B'})}\n{json.dumps(row | {'id': 'r2'})}\n")
    run = lambda *words: CliRunner().invoke(app, ["convert", str(tmp_path / "in.jsonl"), *map(str, words)])  # noqa: E731
    done = run(tmp_path / "out.parquet", "--to", "verl", "--instruction", "Say it.")
    assert done.exit_code == 0 and "note: 1 rows have no answer" in done.output, done.output
    import pyarrow.parquet

    first = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()[0]
    assert first["prompt"][-1]["content"] == "<audio>Which?\nA. dog\nB. cat\nSay it."
    done = run(tmp_path / "out.json", "--to", "mmau", "--choice-style", "lines")
    assert done.exit_code == 2 and "leave out --choice-style" in done.output
    assert run(tmp_path / "swift.jsonl", "--to", "swift").exit_code == 0
    assert [example.answer for example in load_examples(tmp_path / "swift.jsonl")] == ["cat", None]
