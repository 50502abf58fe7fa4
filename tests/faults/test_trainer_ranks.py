"""The real trainer on two gloo ranks under the shipped launch configurations: the numbers of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trainer_ranks
from accelerate.utils import is_deepspeed_available
from trainer_ranks import settings

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2",
          "--main_process_port", "0"]  # fmt: skip


def launch(kind: str, folder: Path, *words: str, precision: str = "no") -> None:
    """trainer_ranks.py under a shipped configuration."""
    config = ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{kind}.yaml"), "--mixed_precision", precision]
    command = [*LAUNCH, *config, trainer_ranks.__file__, str(folder), kind, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def up_to_first_step(source: Path, target: Path) -> None:
    """A run folder as it was when the process died after the checkpoint of step 1."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if path.name != "step_000001":
            shutil.rmtree(path)


def close(ours: list[dict], theirs: list[dict]) -> None:
    """The same rollouts and rewards; the rest up to rounding."""
    assert [line["step"] for line in ours] == [1, 2, 3]
    for mine, expected in zip(ours, theirs, strict=True):
        exact = ("epoch", "reward_vowels", "completion_length", "zero_variance_groups", "truncated")
        assert {name: mine[name] for name in exact} == pytest.approx({name: expected[name] for name in exact})
        assert mine == pytest.approx(expected, rel=2e-3, abs=2e-5)


NO_DEEPSPEED = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
KINDS = ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)]
KINDS += [pytest.param(kind, marks=[pytest.mark.slow, NO_DEEPSPEED]) for kind in ("zero2", "zero3")]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_stop_and_resume_as_one_process(kind, tmp_path):
    cases = trainer_ranks.CASES[kind]
    for name, changes in cases.items():
        train_cases.run(settings(tmp_path / name / "alone", changes))
        up_to_first_step(tmp_path / name / "alone", tmp_path / name / "from one")
    launch(kind, tmp_path)
    for name, changes in cases.items():
        here = tmp_path / name
        alone = train_cases.metrics(here / "alone")
        undisturbed = train_cases.metrics(here / "undisturbed")
        close(undisturbed, alone)
        stopped = train_cases.metrics(here / "stopped")
        assert stopped == undisturbed, name
        close(train_cases.metrics(here / "from one"), alone)
        up_to_first_step(here / "undisturbed", here / "from two")
        _, notes = train_cases.run(settings(here / "from two", changes, resume="auto"))
        assert any(note.startswith("saved by 2 ranks, now 1") for note in notes)
        close(train_cases.metrics(here / "from two"), alone)
        ranks = {p.name for p in (here / "stopped" / "checkpoints" / "step_000003").glob("rank_*.json")}
        assert ranks == {"rank_00000.json", "rank_00001.json"}
        rewards = [line["reward_total"] for line in alone]
        assert len(set(rewards)) > 1, "a run without change would prove nothing"
        assert json.loads((here / "undisturbed" / "checkpoints" / "step_000003" / "complete.json").read_text())


@pytest.mark.slow
@NO_DEEPSPEED
@pytest.mark.parametrize("case", ["uneven", "full"])
def test_zero2_under_bfloat16_takes_the_first_step_of_ddp(case, tmp_path):
    """Float32 weights under autocast. ZeRO-3 rounds otherwise: its linear function, and encoding within autocast."""
    for which in ("ddp", "zero2"):
        launch(which, tmp_path / which, case, precision="bf16")
    ours, theirs = (train_cases.metrics(tmp_path / which / case / "undisturbed")[0] for which in ("zero2", "ddp"))
    assert ours["reward_vowels"] == theirs["reward_vowels"]
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert theirs["sampling/sampling_logp_difference/mean"] > 1e-4, "nothing was computed in 16 bits"
