"""Rows and rewards for other trainers; the slow test runs the real ones, where they are installed (docs/interop.md)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from covo_rl.config import PromptConfig, RewardConfig
from covo_rl.data import DataError, load_examples
from covo_rl.data.read import DataNote
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
    (tmp_path / "mine.py").write_text(
        "def mine(completions, facts, **columns):\n    return [f['n'] / 4 for f in facts]\n"
    )
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
    with pytest.warns(DataNote, match="their questions list options"):
        assert [example.answer for example in load_examples(tmp_path / "swift.jsonl")] == ["cat", None]


# -- the plug-ins: beside what stands in for their trainers, and beside the real ones where those are ---------------


def plug_in(monkeypatch, name, **modules):
    """Import covo_rl.interop.NAME among stand-ins: dotted module names with __ for dots, and what is in them."""
    for dotted, content in modules.items():
        path = dotted.replace("__", ".")
        for part in (path.rsplit(".", n)[0] for n in range(path.count("."), 0, -1)):
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        module = types.ModuleType(path)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.delitem(sys.modules, f"covo_rl.interop.{name}", raising=False)
    return importlib.import_module(f"covo_rl.interop.{name}")


def test_the_plug_in_of_verl(monkeypatch, tmp_path, examples):
    class RLHFDataset:
        @classmethod
        def _process_multi_modal_info(cls, messages, image_patch_size, config):
            return None, None, [part["audio"] for part in messages[0]["content"] if part["type"] == "audio"] or None

    verl = plug_in(monkeypatch, "verl", verl__utils__dataset__rl_dataset={"RLHFDataset": RLHFDataset})
    row = trainer_rows(examples[:1], "verl", tmp_path, PromptConfig())[0]
    chat = [{"role": "user", "content": [{"type": "audio", "audio": row["audios"][0]}, {"type": "text", "text": "?"}]}]
    for config, rate in (({}, 16_000), ({"mm_processor_kwargs": {"sampling_rate": 8000}}, 8000)):
        _, _, (wave,) = verl.AudioQuestions._process_multi_modal_info(chat, 14, config)
        assert wave.dtype == np.float32 and len(wave) == rate  # one second
    assert verl.AudioQuestions._process_multi_modal_info([{"content": []}], 14, {}) == (None, None, None)
    score = verl.compute_score("covo_rl", GOOD, "cat", row["extra_info"] | {"num_turns": 2}, rewards="accuracy=2")
    assert score == {"score": 2.0, "accuracy": 1.0}
    with pytest.raises(RewardError, match="covo-rl data convert"):
        verl.compute_score("gsm8k", GOOD, "cat", None)


def test_the_plug_in_of_ms_swift(monkeypatch, tmp_path, examples):
    orms = {"accuracy": None}
    swift = plug_in(monkeypatch, "swift", swift__rewards={"ORM": type("ORM", (), {}), "orms": orms})
    swift.register("covo_total", "accuracy=1,format=0.5", reward_gate="accuracy")
    with pytest.raises(RewardError, match="give ours another name, for example covo_accuracy"):
        swift.register("accuracy", "accuracy")
    with pytest.raises(RewardError, match="majority needs"):
        swift.register("covo_majority", "majority")
    reward = orms["covo_total"]()
    assert type(reward).__name__ == "covo_total" and set(orms) == {"accuracy", "covo_total"}
    rows = [row["covo_row"] for row in trainer_rows(examples[:1] * 3, "swift", tmp_path, PromptConfig())]
    reasons = ["stop", "stop", "length"]
    assert reward([GOOD, WRONG, GOOD], covo_row=rows, finish_reason=reasons, solution=["cat"] * 3) == [1.5, 0.0, 1.0]
    with pytest.raises(RewardError, match="covo-rl data convert"):
        reward([GOOD])


def test_the_plug_in_of_nemo_rl(monkeypatch, tmp_path, examples):
    import torch

    from covo_rl.data import write

    class RawDataset:
        def split_train_validation(self, test_size, seed):
            self.split = test_size, seed

    def vlm_hf_data_processor(datum, spec, processor, limit, number):
        return {"said": datum, "extra_env_info": {"ground_truth": "x"}, "task_name": datum["task_name"], "idx": number}

    names = "observations metadata next_stop_strings rewards terminateds answers"
    nemo = plug_in(
        monkeypatch, "nemo_rl", ray={"remote": lambda cls: cls},
        nemo_rl__data__datasets__raw_dataset={"RawDataset": RawDataset},
        nemo_rl__data__processors={"vlm_hf_data_processor": vlm_hf_data_processor},
        nemo_rl__distributed__ray_actor_environment_registry={"ACTOR_ENVIRONMENT_REGISTRY": {}},
        nemo_rl__distributed__virtual_cluster={"PY_EXECUTABLES": None},
        nemo_rl__environments__utils={"ENV_REGISTRY": {}},
        nemo_rl__environments__interfaces={
            "EnvironmentInterface": object, "EnvironmentReturn": namedtuple("EnvironmentReturn", names)},
    )  # fmt: skip
    write(trainer_rows([examples[0], examples[2]], "nemo-rl", tmp_path, PromptConfig()), tmp_path / "rows.jsonl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = nemo.AudioRows(data_path=str(tmp_path / "rows.jsonl"), dataset_name="x", split_validation_size=1, seed=3)
    rows.set_processor()
    assert (rows.split, len(rows.dataset), rows.task_name) == ((1, 3), 2, "covo")
    ears = types.SimpleNamespace(feature_extractor=types.SimpleNamespace(sampling_rate=16_000))
    spoken, silent = (rows.processor(row, None, ears, 99, i) for i, row in enumerate(rows.dataset))
    parts = spoken["said"]["messages"][0]["content"]
    assert len(parts[0]["audio"]) == 16_000 and parts[1]["text"].startswith("Which animal?\nA. dog")
    assert [part["type"] for part in silent["said"]["messages"][0]["content"]] == ["text"]
    assert spoken["task_name"] == "covo" and silent["idx"] == 1
    env = nemo.AudioRewards({"num_workers": 8, "covo": {"rewards": "accuracy=1,format=0.5"}})
    logs = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in (GOOD, LOOSE)]
    result = env.step(logs, [spoken["extra_env_info"], silent["extra_env_info"]])
    assert result.rewards.tolist() == [1.5, 0.0] and result.terminateds.tolist() == [1, 1]
    assert result.next_stop_strings == [None, None] and len(result.observations) == 2
    batch = {"rewards": result.rewards, "is_end": torch.tensor([1, 0])}
    assert env.global_post_process_and_metrics(batch) == (
        batch, {"reward": 0.75, "fraction_of_samples_properly_ended": 0.5})  # fmt: skip
    with pytest.raises(RewardError, match="covo-rl data convert"):
        env.step(logs, [{"ground_truth": "cat"}] * 2)
    with pytest.raises(RewardError, match="majority needs"):
        nemo.AudioRewards({"covo": {"rewards": "majority"}})


@pytest.mark.slow
@pytest.mark.parametrize("trainer, variable", [("verl", "COVO_RL_VERL_PYTHON"), ("swift", "COVO_RL_SWIFT_PYTHON")])
def test_the_real_trainers_load_our_rows_and_rewards(trainer, variable):
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(f"set {variable} to a Python that has it (docs/interop.md)")
    script = ROOT / "tests" / "interop" / f"{trainer}_check.py"
    done = subprocess.run([python, str(script)], capture_output=True, text=True, check=False, cwd=os.sep)
    assert done.returncode == 0, done.stdout + done.stderr
