"""The recipes end to end, as a user runs them, and every shipped configuration."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from covo_rl import synth
from covo_rl.data import load_examples

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return synth.render_set(tmp_path_factory.mktemp("questions"), seed=7, train=176, validation=11, test=66)


def launched(*words, timeout=580):
    """The recipe as `accelerate launch` runs it, in processes of its own."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    command = [*LAUNCH, str(ROOT / "recipes" / "grpo_mmau.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout)


def run_here(*words):
    """The recipe in this process: what it ends with, None or its message."""
    main = runpy.run_path(str(ROOT / "recipes" / "grpo_mmau.py"))["main"]
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def data_flags(questions):
    train, test = questions["train"], questions["test"]
    return ["--data", train, "--audio-dir", train.parent, "--eval-data", test, "--eval-audio-dir", test.parent]


@pytest.mark.slow  # .ci/run trains the shipped job, and asserts the same of it
def test_the_main_job_learns_and_leaves_a_complete_run_folder(questions, tmp_path):
    run = tmp_path / "run"
    done = launched(*data_flags(questions), "--output", run, "--max-steps", 12, "--prompts-per-step", 16)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 13))
    first, last = (sum(s["reward_total"] for s in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > first + 0.2, f"R_total {first:.2f} -> {last:.2f}: nothing was learned"

    result = json.loads((run / "result.json").read_text())
    for when in ("before", "after"):
        figures = result[when]
        parts = ["accuracy", "format", "consistency", "thinking"]
        assert figures["n"] == 66
        assert figures["reward_total"] == pytest.approx(sum(figures[f"reward_{p}"] for p in parts), abs=0.02)
        assert figures["accuracy_sampled"] == pytest.approx(figures["reward_accuracy"], abs=1e-9)
    assert result["steps"] == 12 and result["train_seconds"] > 0 and result["trainable_parameters"] > 0
    assert 0 <= result["after_silent_audio"]["accuracy_sampled"] <= 1
    assert 0 <= result["after_swapped_audio"]["accuracy_sampled"] <= 1
    assert json.loads((run / result["adapter"] / "verification.json").read_text())["ok"] is True
    card = (run / result["adapter"] / "README.md").read_text()
    assert f"{result['after']['accuracy_greedy']:.4g}" in card, "the model card lacks the figures of the run"
    assert (run / "curves.png").stat().st_size > 5_000
    rollouts = [json.loads(line) for line in (run / "rollouts" / "step_00012.jsonl").read_text().splitlines()]
    assert len(rollouts) == 16 * 8
    assert set(rollouts[0]["rewards"]) == {"accuracy", "format", "consistency", "thinking"}


@pytest.mark.slow
def test_full_parameter_training_learns_too(questions, tmp_path):
    run = tmp_path / "run"
    assert run_here(*data_flags(questions), "--output", run, "--max-steps", 8, "--prompts-per-step", 16,
                    "--full", "--learning-rate", "2e-4", "--evaluate", "false",
                    "--checkpoint-every", 5, "--export-checkpoints") is None  # fmt: skip
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(s["reward_total"] for s in part) / 2 for part in (steps[:2], steps[-2:]))
    assert last > first + 0.1, f"R_total {first:.2f} -> {last:.2f}: nothing was learned"
    assert json.loads((run / "result.json").read_text())["adapter"] == "model"
    assert [folder.name for folder in (run / "exports").iterdir()] == ["step_000005"]
    halfway, end = (
        json.loads((run / name / "verification.json").read_text()) for name in ("exports/step_000005", "model")
    )
    assert halfway["ok"] and end["ok"]
    assert halfway["max_abs_logit_diff_base"] != end["max_abs_logit_diff_base"]


def test_dry_run_checks_everything_and_starts_nothing(questions, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_here(*data_flags(questions), "--output", run, "--dry-run") is None
    assert "dry run" in capsys.readouterr().out
    assert not (run / "metrics.jsonl").exists() and not (run / "result.json").exists()


def test_bad_rows_are_reported_with_their_ids_before_training(questions, tmp_path):
    rows = json.loads(questions["train"].read_text())[:4]
    rows[1]["audio_id"] = "./nowhere.wav"
    rows[2]["answer"] = "not among the choices"
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    message = run_here("--data", file, "--audio-dir", questions["train"].parent, "--output", tmp_path / "run")
    assert isinstance(message, str) and rows[1]["id"] in message and rows[2]["id"] in message
    assert not (tmp_path / "run").exists()


def test_training_on_the_held_out_clips_is_refused(questions, tmp_path):
    train = questions["train"]
    flags = ["--data", train, "--audio-dir", train.parent, "--eval-data", train, "--eval-audio-dir", train.parent]
    message = run_here(*flags, "--output", tmp_path / "run", "--dry-run")
    assert isinstance(message, str) and "train-7-00000" in message


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.name)
def test_every_accelerate_config_reaches_the_processes(path):
    """Through accelerate's launcher up to a rank's environment; DeepSpeed, a dependency of none, to its options."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    raw = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert str(config.distributed_type).endswith(str(raw["distributed_type"]))
    words = ["--config_file", str(path), "--main_process_port", "0", "recipe.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.num_processes, args.mixed_precision) == (raw["num_processes"], raw["mixed_precision"])
    assert args.use_deepspeed == (raw["distributed_type"] == "DEEPSPEED")
    assert args.use_fsdp == (raw["distributed_type"] == "FSDP")
    if args.use_deepspeed:
        assert args.zero_stage == raw["deepspeed_config"]["zero_stage"]
        return
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == raw["mixed_precision"]
    if args.use_fsdp:
        assert (environment["FSDP_VERSION"], environment["ACCELERATE_USE_FSDP"]) == ("2", "true")
        assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment, "the policy says which: another family has others"


def test_the_minimal_recipe_is_short_and_learns(questions):
    """The whole loop from public pieces, in at most 150 lines."""
    path = ROOT / "recipes" / "grpo_minimal.py"
    assert len(path.read_text().splitlines()) <= 150
    minimal = runpy.run_path(str(path))
    rows = load_examples(str(questions["train"]), str(questions["train"].parent))
    model, rewards = minimal["grpo"](rows, steps=12)
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert last > first + 0.4, f"R_total {first:.2f} -> {last:.2f}: nothing was learned"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
