"""Two FSDP2 ranks that save and resume by shard; test_shards.py looks at what they wrote.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 tests/faults/shard_ranks.py FOLDER

For every case an undisturbed run and one that goes on from its first checkpoint. Each rank writes rank_N.json: the
largest float tensor that any operation returned while the trainer saved and resumed, and its largest piece.
"""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases

from covo_rl.models.weights import WeightsError
from covo_rl.policy.sharding import local_tensor, own_piece, whole
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.checkpoint.state import trained_parameters
from covo_rl.train.launch import join
from covo_rl.train.loop import Trainer
from covo_rl.train.shutdown import exit_after

CASES = {
    "lora": {"lora_r": 4, "lora_alpha": 8.0},
    "full": {"lora": False, "train_parts": ["audio_adapter", "llm", "lm_head"], "beta": 0.05},
}


def settings(folder: Path, changes: dict, **more):
    return train_cases.options(folder, **{"max_steps": 2, "checkpoint_every": 1, **changes, **more})


class Largest(TorchDispatchMode):
    """Elements of the largest float tensor that an operation returned on this rank."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, local_tensor(tensor).numel())
        return out


@contextmanager
def watched(largest: Largest):
    """`largest` sees every save, and the loading of every resume."""

    def under(action):
        def watching(*args):
            with largest:
                return action(*args)

        return watching

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_save", "_restore"):
            patch.setattr(Saver, name, under(getattr(Saver, name)))
        yield


def forward_after_every_step(saver: Saver, trainer: Trainer) -> None:
    """As an evaluation leaves it: FSDP2 keeps the outermost parameters gathered after a forward pass alone."""
    after_step = saver.after_step

    def with_forward(trainer, score=None):
        prompts = [trainer.prompt_of(trainer.sampler.examples[0].id)]
        trainer.engine.collect(trainer.engine.submit(prompts, trainer.options.rollout, seed=1, generations=2))
        after_step(trainer, score)

    saver.after_step = with_forward


def run(options, accelerator) -> Trainer:
    made = train_cases.trainer(options, accelerator=accelerator)
    saver = Saver(options, Path(options.train.output))
    saver.resume(made, options.train.resume)
    forward_after_every_step(saver, made)
    made.run(saver=saver)
    return made


def a_spoiled_piece_stops_every_rank(made: Trainer, options) -> None:
    """NaN in what the second rank alone looks at, and no rank waits for the other."""
    if made.ranks.rank:
        with torch.no_grad():
            local_tensor(next(iter(trained_parameters(made.policy).values())))[0] = float("nan")
    saver = Saver(options, Path(options.train.output))
    saver.finish(made)
    try:
        saver.resume(made, "auto")
    except WeightsError as error:
        assert str(error).startswith("rank 1: the checkpoint's weights: NaN or infinite numbers in 1 ("), error
    else:
        raise AssertionError("it was loaded")


def replicas_write_once() -> None:
    """Of two ranks that hold the same, as in hybrid sharding, the first alone has a piece to write."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    piece = own_piece(distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Replicate(), Shard(0)]))
    rank = torch.distributed.get_rank()
    assert piece is None if rank else piece and piece.tensor.numel() == 6
    flat = init_device_mesh("cpu", (2,))
    small = own_piece(distribute_tensor(torch.ones(1, 3), flat, [Shard(0)]))
    assert (small is None) == (rank == 1), "one row leaves the second rank nothing"


def main() -> None:
    torch.set_num_threads(1)
    folder, accelerator, about = Path(sys.argv[1]), join(), {}
    assert accelerator.num_processes == 2 and accelerator.distributed_type.name == "FSDP"
    replicas_write_once()
    for name, changes in CASES.items():
        here, largest = folder / name, Largest()
        with watched(largest):
            made = run(settings(here / "undisturbed", changes), accelerator)
            if accelerator.is_main_process:
                source = here / "undisturbed" / "checkpoints" / "step_000001"
                shutil.copytree(source, here / "resumed" / "checkpoints" / "step_000001")
            accelerator.wait_for_everyone()
            run(settings(here / "resumed", changes, resume="auto"), accelerator)
        sizes = [(p.numel(), local_tensor(p).numel()) for p in trained_parameters(made.policy).values()]
        with Largest() as gathering:  # which the measure can tell
            gathered = {name: whole(p.detach()) for name, p in trained_parameters(made.policy).items()}
        about[name] = {"touched": largest.numel, "gathering": gathering.numel, "whole": max(s[0] for s in sizes),
                       "piece": max(s[1] for s in sizes)}  # fmt: skip
        if accelerator.is_main_process:
            save_file(gathered, here / "gathered.safetensors")
        a_spoiled_piece_stops_every_rank(made, settings(here / "spoiled", changes))
    (folder / f"rank_{accelerator.process_index}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    exit_after(main)
