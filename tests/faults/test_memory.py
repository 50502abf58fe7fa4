"""Memory that runs out anywhere in an update: the retry changes no number."""

import os
import subprocess
import sys
from pathlib import Path

import memory_ranks
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from memory_ranks import memory_runs_out, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases as cases

from covo_rl.engines import own
from covo_rl.train.guard import TrainingStopped, is_out_of_memory
from covo_rl.train.memory import MicroBatch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def inexact(monkeypatch):
    """As in 16 bits, old log-probs take a pass."""
    monkeypatch.setattr(own, "samples_exactly", lambda policy: False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "samples_exactly", lambda policy: False)
        made, _ = cases.run(settings(folder, oom_retry=False))
    return made, cases.metrics(folder)


@pytest.mark.parametrize(
    ("where", "at"),
    [("forward", 1), ("forward", 3), ("forward", 5), ("forward", 8), ("forward", 12), ("backward", 1), ("backward", 2),
     ("backward", 4), ("backward", 7), ("old_logps", 1), ("old_logps", 3), ("reference", 2), ("reference", 4)],
)  # fmt: skip
def test_a_retry_changes_no_number_wherever_memory_ran_out(tmp_path, inexact, undisturbed, where, at):
    """finding 18: gradients of the failed try stayed unless it failed in micro-batch 0 (norm 1.69, not 1.18)."""
    with memory_runs_out(where, at) as count:
        made, _ = cases.run(settings(tmp_path))
    assert count() > at, "the fault came, and the work went on"
    expected, metrics = undisturbed
    for ours, theirs in zip(cases.metrics(tmp_path), metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for ours, theirs in zip(made.policy.parameters(), expected.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    smaller = made.learner.frozen_size if where in ("old_logps", "reference") else made.learner.size
    assert smaller == MicroBatch(1, 1)


def test_without_the_option_every_pass_says_what_to_lower(tmp_path, inexact):
    for where in ("forward", "backward", "old_logps", "reference"):
        with memory_runs_out(where, 1), pytest.raises(TrainingStopped, match=r"micro_batch_rollouts \(now 3\) to 1"):
            cases.run(settings(tmp_path / where, oom_retry=False))


def test_memory_that_runs_out_in_the_optimiser_says_what_to_lower(tmp_path, monkeypatch):
    """finding 18: Adam's moments are made in the first step; half an update cannot be repeated."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: memory_ranks.full())
    with pytest.raises(TrainingStopped, match="out of memory"):
        cases.run(settings(tmp_path))


def test_accumulation_steps_of_accelerate_change_no_gradient(tmp_path, undisturbed, inexact):
    """finding 18: it divides every loss by them; here micro-batches add up."""
    GradientState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        cases.run(settings(tmp_path, oom_retry=False), accelerator=accelerator)
    finally:
        GradientState._reset_state()
    for ours, theirs in zip(cases.metrics(tmp_path), undisturbed[1], strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_words_of_cublas_and_cudnn():
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


def test_a_retry_on_two_ranks(tmp_path):
    """finding 18: one rank runs out of memory, both start over; FSDP and ZeRO cannot and say so."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2",
               "--mixed_precision", "no", "--main_process_port", "0", "--config_file",
               str(ROOT / "recipes" / "accelerate" / "ddp.yaml"), memory_ranks.__file__, str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 5
    for name in names:
        for ours, theirs in zip(cases.metrics(tmp_path / name), cases.metrics(tmp_path / "undisturbed"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5), name
