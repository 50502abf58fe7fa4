"""Runs and models from Python, as a notebook has them: one process, one after the other, nothing left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from covo_rl import GRPO, load
from covo_rl.audio import ClipStore, decode
from covo_rl.cli import main
from covo_rl.config import ConfigError
from covo_rl.prompt import PromptError
from covo_rl.records.lock import FolderLock
from covo_rl.run.commands.generate import talk
from covo_rl.run.python.chat import Chat
from covo_rl.run.python.outcome import RunError, TrainedRun
from covo_rl.synth import builtin_questions
from covo_rl.types import Clip

SMALL = {"max_steps": 2, "prompts_per_step": 2, "micro_batch_prompts": 2, "num_generations": 4,
         "max_completion_length": 24, "check_rewards": False}  # fmt: skip


def rows_of_split(split, count):
    file = Path(builtin_questions()[split])
    rows = json.loads(file.read_text(encoding="utf-8"))[:count]
    return [{**row, "audio_id": str(file.parent / row["audio_id"])} for row in rows]


@pytest.fixture(scope="module")
def test_rows():
    return rows_of_split("test", 6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, test_rows):
    """(the run, steps that the callback saw, calls of a closure, whether the program's own state was as before)."""
    folder = tmp_path_factory.mktemp("python")
    steps, calls = [], []

    def brevity(completions, **_):
        calls.append(len(completions))
        return [1.0 - min(len(text), 200) / 200 for text in completions]

    before = os.getcwd()
    os.chdir(folder)
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        random.seed(1)
        torch.manual_seed(1)
        state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        made = GRPO(
            model="builtin:tiny", data=rows_of_split("train", 8), rewards=["accuracy", "format", brevity],
            eval_data=test_rows, on_step=steps.append, seed=3, **SMALL,
        )  # fmt: skip
        run = made.train()
        same = state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        same = same and handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        run.folder = run.folder.resolve()
    finally:
        os.chdir(before)
    return run, steps, calls, same


@pytest.fixture(scope="module")
def model(trained):
    return load("builtin:tiny", adapter=trained[0].adapter)


def test_a_run_is_figures_adapter_metrics_and_report(trained, test_rows):
    run, steps, calls, same = trained
    assert same, "random state and signal handlers of the program are as they were"
    assert run.folder.name == "tiny" and (run.folder / "adapter" / "adapter_config.json").is_file()
    assert run.result["after"]["n"] == len(test_rows) and 0 <= run.result["after"]["accuracy_greedy"] <= 1
    assert 0 < run.result["after"]["reward_brevity"] <= 1 and set(calls) == {len(test_rows), 8}
    assert [step.step for step in steps] == [1, 2] == [line["step"] for line in run.metrics]
    assert [row["rewards"].keys() for row in steps[0].rollouts] == [{"accuracy", "format", "brevity"}] * 8
    assert run.report() == run.folder / "report.html" and "<html" in run.report().read_text(encoding="utf-8")
    assert (
        "accuracy_greedy" in run._repr_html_() and repr(run) == "TrainedRun('runs/tiny')"
    ) or run.folder.is_absolute()
    assert FolderLock(run.folder).refusal() is None and not (run.folder / "lock.json").exists()


def test_the_record_says_what_was_in_memory(trained):
    run = trained[0]
    config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    environment = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    assert config["data"].startswith("rows in memory: 8, sha256 ") and config["seed"] == 3
    assert environment["in_memory"] == {"data": config["data"], "eval_data": config["eval_data"]}
    function = environment["reward_functions"]["brevity"]
    assert function["code"].startswith("def brevity(completions") and len(function["sha256"]) == 64
    assert set(environment["sha256"]) == {"reward:accuracy", "reward:format"}


def test_a_second_run_takes_another_folder_and_a_stopped_one_goes_on(trained, tmp_path, monkeypatch, test_rows):
    """Ctrl-C, or the notebook's stop: saved, said how to go on, and the kernel lives."""
    run = trained[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.folder, tmp_path / "runs" / "tiny")

    def stop(record):
        os.kill(os.getpid(), signal.SIGINT)

    options = {**SMALL, "rewards": ["accuracy", "format"], "data": rows_of_split("train", 4), "evaluate": False}
    with pytest.raises(KeyboardInterrupt) as caught:
        GRPO("builtin:tiny", on_step=stop, **options).train()
    assert "go on with GRPO(..., output='runs/tiny-2', resume='auto').train()" in str(caught.value)
    assert "step_000001" in str(caught.value) and not (tmp_path / "runs" / "tiny-2" / "lock.json").exists()
    stopped = TrainedRun("runs/tiny-2")
    with pytest.raises(RunError, match="not finished"):
        stopped.adapter  # noqa: B018 - a property
    with pytest.raises(ConfigError, match="training data"):
        GRPO("builtin:tiny", output="runs/tiny-2", resume="auto", **{**options, "data": options["data"][:3]}).train()
    seen = []
    again = GRPO("builtin:tiny", output="runs/tiny-2", resume="auto", on_step=seen.append, **options).train()
    assert [record.step for record in seen] == [2] and len(again.metrics) == 2
    assert again.result["after"] is None and "not evaluated" in again._repr_html_()
    finished = GRPO("builtin:tiny", output="runs/tiny-2", resume="auto", **options).train()
    assert finished.result == again.result, "nothing was left to do"


def test_a_failed_run_gives_its_folder_back_and_the_next_one_works(tmp_path):
    def fail(record):
        raise ZeroDivisionError("of the user's")

    options = {**SMALL, "rewards": "format", "data": rows_of_split("train", 3), "evaluate": False, "output": tmp_path}
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        GRPO("builtin:tiny", on_step=fail, **options).train()
    assert not (tmp_path / "lock.json").exists() and len(TrainedRun(tmp_path).metrics) == 1
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        GRPO("builtin:tiny", **options).train()
    dry = GRPO("builtin:tiny", **{**options, "output": tmp_path / "dry"}, dry_run=True).train()
    assert not dry.folder.exists()
    with pytest.raises(RunError, match="dry run"):
        dry.result  # noqa: B018


def test_what_is_no_run_model_or_set_is_one_message(model, test_rows, tmp_path):
    with pytest.raises(RunError, match="the run has not begun"):
        TrainedRun(tmp_path / "nowhere").report()
    for wrong in (None, torch.nn.Linear(1, 1)):
        with pytest.raises(ConfigError, match=r"load: model is a (NoneType|Linear): give the folder or hub name"):
            load(wrong)
    with pytest.raises(ConfigError, match="a list is no set's name; give rows as data="):
        model.evaluate(test_rows)
    with pytest.raises(ConfigError, match="a question has one reply"):
        model.chat(temperature=1.0, num_generations=2)
    with pytest.raises(ConfigError, match="seed 'x': expected a whole number"):
        model.chat(seed="x")


def test_too_few_held_out_clips_are_told_before_training_not_after(tmp_path, test_rows):
    rows = rows_of_split("train", 3)
    with pytest.raises(ConfigError, match="the 1 with audio share one clip"):
        GRPO("builtin:tiny", data=rows, eval_data=test_rows[:1], output=tmp_path / "run", **SMALL).train()
    assert not (tmp_path / "run").exists()


# -- asking ----------------------------------------------------------------------------------------------------------


def test_one_sound_by_path_bytes_and_samples_has_one_reply(model, test_rows):
    row = test_rows[0]
    waveform, rate = decode(Clip(path=row["audio_id"]))
    data = Path(row["audio_id"]).read_bytes()
    replies = [model.generate(row["question"], sound, row["choices"], max_completion_length=24)
               for sound in (row["audio_id"], Path(row["audio_id"]), data, (waveform, rate), [data])]  # fmt: skip
    assert len({reply.text for reply in replies}) == 1
    reply = replies[0]
    assert len(reply.tokens) == len(reply.token_ids) == len(reply.logps) and max(reply.logps) <= 0
    assert "".join(reply.tokens).startswith(reply.text) and str(reply) == reply.text
    np.testing.assert_allclose(replies[0].logps, replies[3].logps, atol=1e-4)
    other = model.generate(row["question"], test_rows[1]["audio_id"], row["choices"], max_completion_length=24)
    assert other.logps != reply.logps, "it listens"


def test_many_questions_at_once_are_answered_as_one_by_one(model, test_rows):
    questions = [row["question"] for row in test_rows]
    sounds, choices = ([row[name] for row in test_rows] for name in ("audio_id", "choices"))
    together = model.generate(questions, sounds, choices, max_completion_length=32)
    single = [model.generate(*parts, max_completion_length=32)
              for parts in zip(questions, sounds, choices, strict=True)]  # fmt: skip
    assert [reply.text for reply in together] == [reply.text for reply in single]
    report = model.evaluate(data=test_rows, max_completion_length=32).report
    right = [reply.answer == row["answer"] for reply, row in zip(together, test_rows, strict=True)]
    assert report["accuracy"] == pytest.approx(np.mean(right)) and report["n"] == len(test_rows)


def test_drawn_replies_depend_on_the_seed_and_their_logps_are_those_of_the_scoring_pass(model, test_rows):
    row = test_rows[0]
    ask = {"audio": row["audio_id"], "choices": row["choices"], "temperature": 1.0, "max_completion_length": 24}
    first = model.generate(row["question"], **ask, num_generations=3, seed=5)
    assert first == model.generate(row["question"], **ask, num_generations=3, seed=5)
    assert first != model.generate(row["question"], **ask, num_generations=3, seed=6)
    assert len({reply.text for reply in first}) > 1 and not all(reply.problems == () for reply in first)
    from covo_rl.prompt import messages
    from covo_rl.run.python.calls import decoding_of, rows_of
    from covo_rl.types import Group, Rollout

    (example,) = rows_of(row["question"], row["audio_id"], row["choices"])
    config, _ = decoding_of(None, 1.0, 3, 24, {})
    prompt = model.prompt(example, messages(example, model.answerer.prompt_config), config)
    rollouts = tuple(Rollout(r.token_ids, r.logps, r.text, r.stop_reason) for r in first)
    with torch.no_grad():
        scores = model.policy.logps([Group(prompt, rollouts)], model.policy.features([prompt]), temperature=1.0)
    for reply, logps, mask in zip(first, scores.logps_NC, scores.mask_NC, strict=True):
        np.testing.assert_allclose(reply.logps, logps[mask].numpy(), atol=5e-3)  # its weights are float16


def test_a_file_that_was_recorded_anew_is_heard_anew(model, test_rows, tmp_path):
    a, b = test_rows[0], test_rows[1]
    shutil.copy(a["audio_id"], tmp_path / "clip.wav")
    first = model.generate(a["question"], tmp_path / "clip.wav", a["choices"], max_completion_length=24)
    shutil.copy(b["audio_id"], tmp_path / "clip.wav")
    second = model.generate(a["question"], tmp_path / "clip.wav", a["choices"], max_completion_length=24)
    assert second.logps == model.generate(a["question"], b["audio_id"], a["choices"], max_completion_length=24).logps
    assert first.logps != second.logps
    with pytest.raises(PromptError, match=r"row 2: .*nowhere\.wav"):
        model.generate(["a", "b"], [a["audio_id"], "nowhere.wav"], max_completion_length=24)
    with pytest.raises(PromptError, match=r"the model takes 2048 \(max_position_embeddings\)"):
        model.generate("a", max_completion_length=10_000)


def test_a_conversation_sees_what_was_asked_heard_and_replied(model, test_rows, tmp_path):
    chat = model.chat(max_completion_length=16)
    assert isinstance(chat, Chat)
    first = chat.ask(test_rows[0]["question"], audio=test_rows[0]["audio_id"])
    with pytest.raises(OSError, match="nowhere"):
        chat.ask("And this?", audio=tmp_path / "nowhere.wav")
    assert len(chat.turns) == 2 and len(chat.heard) == 1, "as it was"
    chat.ask("And this?", audio=test_rows[1]["audio_id"])
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2 and len(chat.heard) == 2
    assert chat.turns[1]["content"][0]["text"] == first.text
    chat.reset()
    assert chat.ask(test_rows[0]["question"], audio=test_rows[0]["audio_id"]) == first


def test_the_terminal_s_talk_survives_whatever_is_typed(model, test_rows, capsys, tmp_path):
    chat = model.chat(max_completion_length=8)
    lines = ["", "What?", "/audio nowhere.wav", f"/audio {test_rows[1]['audio_id']}", "And now?", "/foo", "/reset",
             "a" * 9000, "/quit", "never"]  # fmt: skip
    talk(chat, iter(lines), [Path(test_rows[0]["audio_id"])])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2, "two replies"
    for words in ("nowhere.wav: no such file", "goes with the next question", "there is no /foo", "forgotten",
                  "max_position_embeddings"):  # fmt: skip
        assert words in printed.err
    assert chat.turns == []


def test_generate_at_the_terminal_prints_what_python_returns(model, trained, test_rows, capsys):
    row = test_rows[0]
    words = ["generate", "--adapter", str(trained[0].adapter), "--audio", row["audio_id"]]
    words += ["--question", row["question"], "--max-completion-length", "24"]
    words += [word for choice in row["choices"] for word in ("--choice", choice)]
    with pytest.raises(SystemExit) as done:
        main([*words, "--json"])
    assert done.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    reply = model.generate(row["question"], row["audio_id"], row["choices"], max_completion_length=24)
    assert (printed["text"], tuple(printed["token_ids"])) == (reply.text, reply.token_ids)
    with pytest.raises(SystemExit) as done:
        main([*words, "--audio", "nowhere.wav"])
    assert done.value.code == 2 and "--audio nowhere.wav: no such file" in capsys.readouterr().err


def test_an_evaluation_is_that_of_the_command(model, trained, tmp_path):
    from covo_rl.evaluate.cli import app

    report = model.evaluate("builtin", limit=5, max_completion_length=32, output=tmp_path / "python")
    words = ["--set", "builtin", "--limit", 5, "--max-completion-length", 32, "--adapter", trained[0].adapter]
    words += ["--model", "builtin:tiny", "--output", tmp_path / "command", "--no-plots"]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    stored = json.loads((tmp_path / "command" / "report.json").read_text(encoding="utf-8"))
    assert report.report == stored and report.folder == tmp_path / "python"
    assert report.markdown.startswith("# covo_rl built-in questions") and report._repr_markdown_() == report.markdown
    with pytest.raises(ConfigError, match="name a set"):
        model.evaluate()
    with pytest.raises(ConfigError) as caught:
        load("builtin:tiny", adapter="nowhere", dtype="int8", choice_style="foo", device="cuda:99")
    assert len(caught.value.problems) == 4


def test_a_store_forgets_what_a_file_held(tmp_path, test_rows):
    shutil.copy(test_rows[0]["audio_id"], tmp_path / "a.wav")
    store, clip = ClipStore(), Clip(path=str(tmp_path / "a.wav"))
    key = store.key(clip)
    store.waveform(key)
    shutil.copy(test_rows[1]["audio_id"], tmp_path / "a.wav")
    store.forget()
    assert store.key(clip) != key and len(store) == 0
