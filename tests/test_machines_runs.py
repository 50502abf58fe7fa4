"""Two launchers on this machine, as if it were two: gloo, the recipe, recipes/machines/trainer.sh.

What they train is what one launcher with as many ranks trains.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file

from covo_rl.audio import ClipStore
from covo_rl.config import parse_options
from covo_rl.policy import Policy
from covo_rl.policy.loading import trainable_policy
from covo_rl.run.defaults import with_defaults

sys.path.insert(0, str(Path(__file__).parent / "faults"))
sys.path.insert(0, str(Path(__file__).parent / "serving"))
from fake_server import FakeServer
from processes import kill_all
from test_machines import free_ports, wait_until

ROOT = Path(__file__).parents[1]
RECIPE = ["--max_steps", "3", "--prompts_per_step", "4", "--num_generations", "4", "--max_completion_length", "24",
          "--limit", "12", "--check_rewards", "false", "--evaluate", "false"]  # fmt: skip
NO_DEEPSPEED = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
KINDS = [("ddp", 1), ("hsdp", 2), pytest.param("zero3", 1, marks=NO_DEEPSPEED)]
PATIENCE_S = 400  # a run takes half a minute on an idle machine
pytestmark = pytest.mark.slow


def start(
    kind: str, machines: int, gpus: int, output: Path, *words: str, places: Sequence[Path] = (ROOT, ROOT),
    servers: str = "",
) -> list[subprocess.Popen]:  # fmt: skip
    """A launcher a machine, as recipes/slurm and recipes/ssh start it, in float32."""
    env = {
        "VENV": str(Path(sys.executable).parents[1]), "MACHINES": str(machines), "HEAD": "127.0.0.1",
        "PORT": str(free_ports(1)), "GPUS": str(gpus), "LAUNCH": "--mixed_precision no", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "SERVERS": servers,
    }  # fmt: skip
    script = ["bash", str(ROOT / "recipes" / "machines" / "trainer.sh"), kind, *RECIPE, "--output", str(output)]
    return [
        subprocess.Popen([*script, *words], env={**os.environ, **env, "MACHINE_RANK": str(rank)}, cwd=places[rank],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(machines)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], good: bool = True) -> str:
    """What they printed, machine after machine."""
    try:
        outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill_all(process)
    for process, output in zip(processes, outputs, strict=True):
        assert (process.returncode == 0) == good, output[-6000:]
    return "\n".join(outputs)


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without what takes time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_alike(two: list[dict], one: list[dict], *, exact: bool) -> None:
    """Under HSDP one machine has one copy over four shards, and sums round differently."""
    assert len(two) == len(one) == 3
    for a, b in zip(two, one, strict=True):
        assert a == (b if exact else pytest.approx(b, rel=1e-3, abs=1e-5))


@pytest.mark.parametrize(("kind", "gpus"), KINDS)
def test_two_machines_train_what_one_machine_with_as_many_ranks_trains(kind, gpus, tmp_path):
    finish(start(kind, 2, gpus, tmp_path / "two"))
    finish(start(kind, 1, 2 * gpus, tmp_path / "one"))
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert_alike(two, one, exact=kind != "hsdp")
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    checkpoint = tmp_path / "two" / "checkpoints" / "step_000003"
    assert len([*checkpoint.glob("rank_*.json")]) == 2 * gpus
    pieces = [load_file(path) for path in sorted(checkpoint.glob("weights*.safetensors"))]
    assert [bool(piece) for piece in pieces] == {"hsdp": [True, True, False, False]}.get(kind, [True]), (
        "one copy is saved"
    )


def tiny_policy() -> Policy:
    """builtin:tiny with an adapter as the recipe makes it."""
    options, cpu = parse_options(with_defaults([])), torch.device("cpu")
    return trainable_policy(options.model, options.adapter, clips=ClipStore(), device=cpu, learning_rate=0.0)[0]


@pytest.mark.parametrize(("kind", "gpus"), KINDS)
def test_two_machines_with_a_rollout_server_for_each_train_what_one_machine_trains(kind, gpus, tmp_path):
    """One step ahead. A rank asks the server of its number first, and tokens hang on seeds, not on who is asked."""
    with FakeServer(tiny_policy()) as first, FakeServer(tiny_policy()) as second:
        for name, machines in (("two", 2), ("one", 1)):
            (tmp_path / "urls").write_text(f"{first.url}\n{second.url}\n")
            before = [server.paths()["/inference/v1/generate"] for server in (first, second)]
            words = ["--rollout_ahead", "1", "--vllm_adapter_dir", str(tmp_path / f"adapters-{name}")]
            finish(start(kind, machines, 2 * gpus // machines, tmp_path / name, *words, servers=str(tmp_path / "urls")))
            asked = [
                server.paths()["/inference/v1/generate"] - n for server, n in zip((first, second), before, strict=True)
            ]
            assert min(asked) >= 3 * 2, f"{asked}: each rank's two groups a step, from its own server"
    two, one = (
        [{k: v for k, v in step.items() if not k.startswith(("engine/", "time/"))} for step in metrics(tmp_path / name)]
        for name in ("two", "one")
    )
    assert_alike(two, one, exact=kind != "hsdp")
    lags = [step["engine/lag"] for step in metrics(tmp_path / "two")]
    assert lags == [0, 1, 1]


@pytest.mark.parametrize("how", ["SIGTERM to one machine", "one launcher is killed"])
def test_machines_that_are_stopped_or_fail_leave_a_checkpoint_from_which_all_go_on(how, tmp_path):
    """A launcher that is killed takes its rank along, which on Linux saves with the others first."""
    words = ["--max_steps", "30"]
    finish(start("ddp", 2, 1, tmp_path / "undisturbed", *words))
    output = tmp_path / "run"
    processes = start("ddp", 2, 1, output, *words)
    log = output / "metrics.jsonl"
    wait_until(lambda: log.is_file() and len(log.read_text().splitlines()) >= 3, PATIENCE_S)
    begun = time.monotonic()
    processes[1].send_signal(signal.SIGTERM if "TERM" in how else signal.SIGKILL)
    printed = finish(processes, good=False)
    assert time.monotonic() - begun < 60
    assert printed.count("stopped by SIGTERM after saving") == 1
    assert 3 <= len(metrics(output)) < 30
    assert "resumed from" in finish(start("ddp", 2, 1, output, *words))
    assert metrics(output) == metrics(tmp_path / "undisturbed")


def test_machines_with_folders_of_their_own_are_refused_before_anything_is_written(tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    printed = finish(start("ddp", 2, 1, Path("runs/mine"), places=places), good=False)
    assert "cannot see what rank 0 writes: several machines need one --output" in printed
    assert f"rank 1 ({places[1]}/runs/mine on " in printed
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("runs/mine"))
