"""The real trainer on the ranks that `accelerate launch` started; test_trainer_ranks.py compares with one process.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 tests/faults/trainer_ranks.py FOLDER

For every case of this launch: an undisturbed run, one that is stopped in the middle of a batch and resumed, and one
that goes on from a checkpoint of a single process.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases

from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.launch import join
from covo_rl.train.shutdown import exit_after

#: three prompts on two ranks are uneven; with micro-batches of one prompt the ranks make 2 and 1 passes
UNEVEN = {"prompts_per_step": 3, "micro_batch_prompts": 1, "num_iterations": 2, "beta": 0.05}
#: one prompt leaves the second rank without work, and steps_per_generation the first one in every second update
IDLE = {"prompts_per_step": 1, "steps_per_generation": 2}
FULL = {"lora": False, "train_parts": ["llm", "lm_head"], **UNEVEN}
CASES = {
    "ddp": {
        "uneven": {**UNEVEN, "dynamic_sampling": 1},
        "a rank without work": IDLE,
        "full": {**FULL, "top_entropy_quantile": 0.5, "train_parts": ["encoder", "audio_adapter", "llm", "lm_head"]},
    },
    "fsdp2": {"uneven": {**UNEVEN, "dynamic_sampling": 1}, "a rank without work": IDLE, "full": FULL},
}
CASES |= {"zero2": CASES["fsdp2"], "zero3": CASES["fsdp2"]}


def settings(folder: Path, changes: dict, **more):
    return train_cases.options(folder, **{"max_steps": 3, "checkpoint_every": 1, "keep_last": 9, **changes, **more})


class StopAtOnce(StopSignals):
    def __init__(self):
        self.received = "SIGTERM"


def main() -> None:
    torch.set_num_threads(1)
    folder, accelerator = Path(sys.argv[1]), join()
    zero = accelerator.state.deepspeed_plugin
    kind = f"zero{zero.zero_stage}" if zero else "fsdp2" if accelerator.distributed_type.name == "FSDP" else "ddp"
    assert accelerator.num_processes == 2 and kind == sys.argv[2], (accelerator.distributed_type, os.environ)
    for name, changes in CASES[kind].items():
        here = folder / name
        train_cases.run(settings(here / "undisturbed", changes), accelerator=accelerator)
        try:
            train_cases.run(settings(here / "stopped", changes), stop=StopAtOnce(), accelerator=accelerator)
        except StoppedBySignal as stopped:
            assert "step_000000.001" in stopped.message, stopped.message
        for which in ("stopped", "from one"):
            train_cases.run(settings(here / which, changes, resume="auto"), accelerator=accelerator)


if __name__ == "__main__":
    exit_after(main)
