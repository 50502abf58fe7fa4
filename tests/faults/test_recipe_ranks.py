"""The shipped recipe on two CPU ranks under the shipped launch configurations: whole runs, dead ranks, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from processes import children, kill_all
from safetensors.torch import load_file
from typer.testing import CliRunner

from covo_rl.export.cli import app

ROOT = Path(__file__).parents[2]
RECIPE = [str(ROOT / "recipes" / "grpo_mmau.py"), "--max_steps", "3", "--prompts_per_step", "3", "--num_generations",
          "4", "--max_completion_length", "24", "--limit", "10", "--check_rewards", "false"]  # fmt: skip
DUPLEX = [str(ROOT / "recipes" / "grpo_duplex.py"), "--max-steps", "3", "--num-generations", "4", "--duplex-width",
          "16", "--rl-streams", "12", "--test-streams", "12", "--sft-streams", "40", "--sft-steps", "3", "--eval-every",
          "2", "--beta", "0.01"]  # fmt: skip
UNEVALUATED = ["--evaluate", "false"]
PATIENCE_S = 400  # a run takes 20 s on an idle machine
NO_DEEPSPEED = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
CONFIGS = ["ddp", "fsdp2", *(pytest.param(kind, marks=NO_DEEPSPEED) for kind in ("zero2", "zero3"))]


def launcher(config: str) -> list[str]:
    """Two CPU ranks under a shipped configuration, in float32."""
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
            str(ROOT / "recipes" / "accelerate" / f"{config}.yaml"), "--num_processes", "2", "--mixed_precision", "no",
            "--main_process_port", "0"]  # fmt: skip


def start(words: list[str], output: Path, config: str | None = None, recipe: list[str] = RECIPE) -> subprocess.Popen:
    words = [*(launcher(config) if config else [sys.executable]), *recipe, *words, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """Everything it printed; it must end well."""
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            kill_all(process)
    assert process.returncode == 0, output[-6000:]
    return output


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_dry_run_under_each_configuration_for_several_gpus(config, tmp_path):
    output = finish(start([*UNEVALUATED, "--dry-run"], tmp_path, config))
    assert "2 process(es)" in output and output.count("dry run: data, configuration") == 1
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_the_recipe_on_two_ranks_reports_what_one_process_reports(config, tmp_path):
    words = ["--eval_limit", "12", "--eval_every", "3", "--eval_set", "builtin,limit=11"]
    finish(start(words, tmp_path / "one"))
    finish(start(words, tmp_path / "two", config))
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    for when in ("before", "after", "after_silent_audio", "after_swapped_audio"):
        assert two[when] == pytest.approx(one[when]), when
    assert json.loads((tmp_path / "two" / "adapter" / "verification.json").read_text())["ok"] is True
    checkpoint = tmp_path / "two" / "checkpoints" / "step_000003"
    assert len([*checkpoint.glob("weights*.safetensors")]) == (2 if config == "fsdp2" else 1)
    done = CliRunner().invoke(app, ["export", str(checkpoint), "--adapter", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", tmp_path / "two/adapter"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = (tmp_path / "two" / "rollouts" / "step_00003.jsonl").read_text().splitlines()
    assert len(rows) == 3 * 4, "the rollouts of every rank are logged"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_loses_a_rank_or_is_stopped_ends_within_a_minute_and_resumes(number, tmp_path):
    """SIGKILL hits one rank, SIGTERM the launcher."""
    words = [*UNEVALUATED, "--max_steps", "40", "--checkpoint_every", "1"]
    undisturbed = tmp_path / "undisturbed"
    finish(start(words, undisturbed, "ddp"))
    output = tmp_path / "run"
    process = start(words, output, "ddp")
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not list(output.glob("checkpoints/step_00000[3-9]")):
            assert process.poll() is None, process.communicate()[0][-6000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(children(process.pid)[-1] if number == signal.SIGKILL else process.pid, number)
        begun = time.monotonic()
        printed, _ = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - begun < 60
    finally:
        if process.poll() is None:
            kill_all(process)
    assert process.returncode != 0
    assert ("SIGKILL" if number == signal.SIGKILL else "stopped by SIGTERM after saving") in printed
    assert 3 <= len(metrics(output)) < 40
    assert "resumed from" in finish(start([*words, "--resume", "auto"], output, "ddp"))
    assert metrics(output) == metrics(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 5])
def test_learning_when_to_speak_on_two_ranks_is_that_of_one_process(streams, tmp_path):
    """One stream a step leaves a rank without any; five are three and two, in passes of two."""
    words = ["--prompts-per-step", str(streams), "--micro-batch-prompts", "2"]
    finish(start(words, tmp_path / "one", recipe=DUPLEX))
    said = finish(start(words, tmp_path / "two", "ddp", DUPLEX))
    assert said.count("before -> after") == 1
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    for name in ("before", "after"):
        ours, theirs = (result[name]["expected"]["early_long_pause"] for result in (two, one))
        assert ours == pytest.approx(theirs, abs=1e-4)
    folders = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert folders[0] == folders[1] and "sft" in folders[0]
    taught, ours = (load_file(tmp_path / name / "sft" / "model.safetensors") for name in ("one", "two"))
    assert taught.keys() == ours.keys() and all(torch.equal(taught[name], ours[name]) for name in taught)
    rows = (tmp_path / "two" / "rollouts" / "step_00003.jsonl").read_text().splitlines()
    assert len(rows) == 4 * streams, "the rollouts of every rank are logged"
