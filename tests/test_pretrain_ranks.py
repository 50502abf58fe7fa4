"""Two gloo ranks, DDP and FSDP2, train as one process does: whoever has clips or labels, and one goes on for two."""

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

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("pretrain_ranks_worker.py")
MODES = pytest.mark.parametrize("mode", ["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the worker leaves. Two tasks with sound and one without: some rows, and so some ranks, hold no clip."""
    folder = tmp_path_factory.mktemp("ranks")
    tasks = {"interleave_1": {"weight": 2}, "text": {"weight": 4}, "asr": {"weight": 1}}
    options = {"model": cases.save_model(folder / "model"), "tasks": tasks, "learning_rate": 1e-3, "steps": 4,
               "length": 128, "checkpoint_every": 2, **cases.write_rows(folder / "rows")}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (folder / "said").write_text(" ".join(done.stdout.split()))
    return folder


def same_weights(ours, theirs):
    for name, value in theirs.items():
        # AdamW moves a weight by the rate whatever its gradient: rounding may turn the sign of one near 0
        assert (ours[name] - value).abs().max() < 1e-2, name
        assert ((ours[name] - value).abs() > 1e-4).float().mean() < 0.02, name


def same_lines(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        names = ("taught", "tokens", "clips")
        assert [mine[name] for name in names] == [other[name] for name in names]
        assert mine.get("loss") == pytest.approx(other.get("loss"), abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@MODES
def test_a_rank_may_have_no_clip_and_no_label(folder, mode):
    alone = torch.load(folder / "alone-0.pt")
    for rank in (0, 1):
        both = torch.load(folder / f"{mode}-{rank}.pt")  # all parts train, and the adapter alone
        for (ours, weights), (theirs, expected) in zip(both, alone, strict=True):
            assert list(ours) == list(theirs) and [line["taught"] > 0 for line in ours.values()] == [1, 1, 1, 0, 1, 1]
            same_lines(ours.values(), theirs.values())
            same_weights(weights, expected)
    assert alone[0][0]["clips on no rank"]["grad_norm"] > 0 == alone[1][0]["clips on no rank"]["grad_norm"]


@MODES
def test_two_ranks_train_on_the_rows_of_one_process_which_goes_on_where_they_stopped(folder, mode):
    """The run's last two updates are made by one process from the second update's checkpoint of two."""
    ours, theirs = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in (mode, "alone")
    )
    same_lines(ours, theirs)
    models = [load_family(str(folder / name)).model.state_dict() for name in (mode, "alone")]
    same_weights(*models)
    said = (folder / "said").read_text()
    assert "passed over step_000004" in said
    assert said.count("saved by 2 ranks, now 1: rows, weights and optimiser go on exactly") == 2
