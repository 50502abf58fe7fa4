"""What engines are sent by a policy in pieces: the same files as by one in one piece. Under torchrun, or on one rank.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/sync_ranks_worker.py SHARED_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import policy_cases as cases
from ranks_worker import shard

from covo_rl.config import AdapterConfig
from covo_rl.engines.base import EngineError
from covo_rl.engines.own import OwnEngine
from covo_rl.engines.policy_files import AdapterFiles, WeightFiles
from covo_rl.engines.probe import Probe, weight_noise
from covo_rl.policy import Policy
from covo_rl.policy.sharding import every_rank, local_tensor
from covo_rl.policy.trainable import make_trainable
from covo_rl.train.shutdown import exit_after

KINDS = {"lora": {"lora_r": 4}, "whole": {"lora": False, "train_parts": ["llm", "lm_head"]}}


class Deaf(OwnEngine):
    """Fails on rank 0 alone; the others are in the policy's pass by then."""

    def collect(self, pending):
        groups = super().collect(pending)
        if not dist.get_rank():
            raise EngineError("nothing answers")
        return groups


def made(kind: str) -> tuple:
    torch.manual_seed(0)
    trainable = make_trainable(cases.family(), AdapterConfig(**KINDS[kind]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.family.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainable, Policy(trainable.family, trainable.peft_model, clips=cases.ClipStore())


def files_of(kind: str, trainable, folder: Path) -> dict[str, torch.Tensor]:
    """What an engine would read, as every rank sees it."""
    if kind == "lora":
        files = AdapterFiles(trainable, folder)
        read = load_file(files.write(0) / "adapter_model.safetensors")
    else:
        files, read = WeightFiles(trainable, folder, shard_bytes=20_000), {}
        for path in files.shards():
            read |= load_file(path)
            every_rank(None)  # nobody reads it any more
    every_rank(None)
    files.close()
    return read


def check(kind: str, folder: Path) -> None:
    """Raises AssertionError where the pieces are not the whole."""
    whole, policy = made(kind)
    in_pieces, sharded = made(kind)
    prompt = cases.prompts(policy)[0]
    cases.prompts(sharded)
    shard(sharded)
    expected, read = files_of(kind, whole, folder), files_of(kind, in_pieces, folder)
    assert read.keys() == expected.keys() and all(torch.equal(read[key], expected[key]) for key in read)

    model = in_pieces.family.model
    before = [local_tensor(p).clone() for p in model.parameters()]
    with weight_noise(model) as draw:
        draw(0.1)
        moved = files_of(kind, in_pieces, folder)
        assert any(not torch.equal(moved[key], expected[key]) for key in moved)
    assert all(torch.equal(local_tensor(p), old) for p, old in zip(model.parameters(), before, strict=True))

    probe = Probe(sharded, prompt)
    assert probe.check_random(OwnEngine(sharded)) <= 1e-5
    try:
        probe.check(Deaf(sharded), 0)
        failure = ""
    except EngineError as error:
        failure = str(error)
    assert every_rank(failure) == ["nothing answers", *[""] * (dist.get_world_size() - 1)]

    blocked = folder / "a-file"
    if not dist.get_rank():
        blocked.write_text("")
    try:
        AdapterFiles(in_pieces, blocked / "below") if kind == "lora" else WeightFiles(in_pieces, blocked / "below")
        raise AssertionError("a folder below a file")
    except EngineError as error:  # on every rank, not a wait for ever
        assert "rank 0: " in str(error)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in KINDS:
        check(kind, Path(sys.argv[1]))
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: equal", flush=True)


if __name__ == "__main__":
    exit_after(main)
