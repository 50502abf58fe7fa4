"""The real trainer on the ranks that `accelerate launch` started; test_trainer_ranks.py compares with one process.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 tests/faults/trainer_ranks.py \\
        FOLDER KIND [CASE]

For every case of this launch: an undisturbed run, one that is stopped in the middle of a batch and resumed, and one
that goes on from a checkpoint of a single process; under DeepSpeed also updates that are not finite. With CASE: the
undisturbed run of DeepSpeed's case of that name, alone.
"""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases

from covo_rl.train.checkpoint import state
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.launch import join
from covo_rl.train.shutdown import exit_after

#: three prompts on two ranks are uneven; with micro-batches of one prompt the ranks make 2 and 1 passes
UNEVEN = {"prompts_per_step": 3, "micro_batch_prompts": 1, "num_iterations": 2, "beta": 0.05}
AHEAD = {**UNEVEN, "dynamic_sampling": 1, "rollout_ahead": 1}
#: one prompt leaves the second rank without work, and steps_per_generation the first one in every second update
IDLE = {"prompts_per_step": 1, "steps_per_generation": 2}
FULL = {"lora": False, "train_parts": ["llm", "lm_head"], **UNEVEN}
CASES = {
    "ddp": {
        "uneven": AHEAD,
        "a rank without work": {**IDLE, "policy_ids": "codes"},
        # a quantile in no tie: first tokens of a prompt are equal but for rounding
        "full": {**FULL, "top_entropy_quantile": 0.67, "train_parts": ["encoder", "audio_adapter", "llm", "lm_head"]},
    },
    "fsdp2": {
        "uneven": AHEAD,
        "a rank without work": IDLE,
        "full": FULL,
    },
}
CASES |= {"zero2": CASES["fsdp2"], "zero3": CASES["fsdp2"]}
APART = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")


def settings(folder: Path, changes: dict, **more):
    return train_cases.options(folder, **{"max_steps": 3, "checkpoint_every": 1, "keep_last": 9, **changes, **more})


class StopAtOnce(StopSignals):
    def __init__(self):
        self.received = "SIGTERM"


def spoil(trainer, updates: dict[int, str]) -> None:
    """On the second rank only: at these steps the log-probs are NaN, or their gradient is infinite."""
    learner, scored = trainer.learner, trainer.learner._scored

    def spoiled(groups):
        result = scored(groups)
        how = updates.get(trainer.step) if learner.ranks.rank == 1 else None
        if how == "loss":
            return result._replace(logps_NC=result.logps_NC * math.nan)
        if how == "gradient":
            result.logps_NC.register_hook(lambda gradient: gradient * math.inf)
        return result

    learner._scored = spoiled


def check_guard(folder: Path, accelerator) -> None:
    """DeepSpeed passes spoiled updates over on every rank, the guard counts them, and the run goes on."""
    trainer = train_cases.trainer(settings(folder, {"micro_batch_prompts": 1, "max_steps": 4}), accelerator=accelerator)
    spoil(trainer, {1: "loss", 2: "gradient"})
    weights = [state.weights(trainer.policy)]
    norms = []
    for _ in range(4):
        norms.append(trainer.train_step()[0]["grad_norm"])
        weights.append(state.weights(trainer.policy))
    moved = [any(not torch.equal(w[name], v[name]) for name in w) for w, v in itertools.pairwise(weights)]
    assert moved == [True, False, False, True], moved
    assert trainer.guard.skipped == 2 and trainer.learner.applied == 2
    assert [math.isfinite(norm) for norm in norms] == moved, norms
    assert all(value.isfinite().all() for value in weights[-1].values())
    dumps = [folder / "debug" / f"step_{step:06d}" / f"rank_{trainer.ranks.rank:05d}.json" for step in (1, 2)]
    whys = [json.loads(path.read_text())["not_finite"].keys() for path in dumps]
    assert "loss" in whys[0] and list(whys[1]) == ["grad_norm"], whys


def main() -> None:
    torch.set_num_threads(1)
    folder, accelerator = Path(sys.argv[1]), join()
    plugin = accelerator.state.deepspeed_plugin
    kind = f"zero{plugin.zero_stage}" if plugin else "fsdp2" if accelerator.distributed_type.name == "FSDP" else "ddp"
    assert accelerator.num_processes == 2 and kind == sys.argv[2], (accelerator.distributed_type, os.environ)
    if plugin:  # DeepSpeed would leave parameters of this size whole, and keep what it will soon need again
        plugin.deepspeed_config["zero_optimization"] |= dict.fromkeys(APART, 0)
    only = sys.argv[3:]
    cases = {name: CASES["zero2"][name] for name in only} if only else CASES[kind]
    for name, changes in cases.items():
        here = folder / name
        trainer, _ = train_cases.run(settings(here / "undisturbed", changes), accelerator=accelerator)
        whole = [name for name, p in trainer.policy.named_parameters() if p.numel()]
        assert kind != "zero3" or not whole, whole
        if only:
            return
        try:
            train_cases.run(settings(here / "stopped", changes), stop=StopAtOnce(), accelerator=accelerator)
        except StoppedBySignal as stopped:
            assert "step_000000.001" in stopped.message, stopped.message
        for which in ("stopped", "from one"):
            train_cases.run(settings(here / which, changes, resume="auto"), accelerator=accelerator)
    if plugin:
        check_guard(folder / "guard", accelerator)


if __name__ == "__main__":
    exit_after(main)
