"""Two gloo ranks under torchrun, DDP and FSDP2, train on the rows of one process, to its losses and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pretrain_cases as cases
import pytest
import torch
import yaml

from covo_rl.models import load_family

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "pretrain.py")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two tasks with sound and one without: some rows, and so some ranks, hold no clip."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = cases.write_rows(folder / "rows")
    tasks = {"interleave_1": {"weight": 2}, "text": {"weight": 4}, "asr": {"weight": 1}}
    options = {"model": cases.save_model(folder / "model"), "tasks": tasks, "learning_rate": 1e-3, "steps": 4,
               "length": 128, "checkpoint_every": 2, **rows}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    return folder / "config.yaml"


def run(config, output, *words, ranks=1, **environment):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, RECIPE, "--config", str(config), "--output", str(output), *map(str, words)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], done.stdout


def same(ours, theirs, output, reference):
    for mine, other in zip(ours, theirs, strict=True):
        assert [mine[name] for name in ("taught", "tokens", "clips")] == [
            other[n] for n in ("taught", "tokens", "clips")
        ]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    trained, expected = (load_family(str(folder)).model.state_dict() for folder in (output, reference))
    for name, value in expected.items():
        # AdamW moves a weight by the rate whatever its gradient: rounding may turn the sign of one near 0
        assert (trained[name] - value).abs().max() < 4e-3, name
        assert ((trained[name] - value).abs() > 1e-4).float().mean() < 0.02, name


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    return output, run(config, output, "--gradient-accumulation-steps", 2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_ranks_are_one_process_and_one_goes_on_where_two_stopped(config, alone, tmp_path, environment):
    reference, theirs = alone
    output = tmp_path / "run"
    ours, _ = run(config, output, ranks=2, **environment)
    same(ours, theirs, output, reference)
    for name in ("step_000004",):
        torch.save({}, output / "checkpoints" / name / "weights.safetensors")  # damaged: the one before is taken
    again, said = run(config, output, "--resume", "--gradient-accumulation-steps", 2)
    assert "step_000002 (step 2)" in said and "passed over step_000004" in said
    assert "saved by 2 ranks, now 1: rows, weights and optimiser go on exactly" in " ".join(said.split())
    same(again, theirs, output, reference)
