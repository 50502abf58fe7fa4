"""Started by test_pretrain_ranks.py: two gloo ranks, forked after the imports, against one process.

    python pretrain_ranks_worker.py ddp|fsdp2

Updates of rows of which one rank's hold no clip, no label, or neither. Prints one line of JSON: differences by case.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import pretrain_cases as cases

from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.policy.sharding import whole
from covo_rl.supervised.pretrain.config import read_pretrain
from covo_rl.supervised.pretrain.trainer import PretrainTrainer
from covo_rl.train.launch import join

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip
PARTS = (["audio_adapter", "llm", "lm_head"], ["audio_adapter"])


def batches(family) -> dict[str, list]:
    """What each of two ranks, or one process in two micro-batches, computes of an update."""
    documents = cases.mixed(family)
    sound, text = [documents[:1] + documents[2:]], [documents[1:2]]

    def packed(rows, silenced=False):
        batch = cases.packed(family, rows, 420)
        if silenced:
            batch.labels.fill_(IGNORE)
        return batch

    return {
        "clips on one rank": [packed(sound), packed(text)],
        "labels on the other rank alone": [packed(sound, silenced=True), packed(text)],
        "neither clips nor labels on a rank": [packed(text, silenced=True), packed(sound)],
        "no label at all": [packed(sound, silenced=True), packed(text, silenced=True)],
    }


def updates(rank: int, world: int, parts: list[str]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The lines of metrics of all cases, and the weights after them."""
    family = cases.tiny_family()
    config = read_pretrain(None, {
        "model": "m", "tasks": {"asr": {}}, "learning_rate": 1e-3, "steps": 9, "length": 420, "train_parts": parts,
        "gradient_accumulation_steps": 3 - world,
    })  # fmt: skip
    trainer = PretrainTrainer(config, family, None, join())
    lines = [trainer.update(given if world == 1 else given[rank : rank + 1]) for given in batches(family).values()]
    state = {name: whole(tensor).clone() for name, tensor in family.model.state_dict().items()}
    return lines, state


def work(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    faulthandler.dump_traceback_later(100, exit=True)  # a hang says where
    torch.set_num_threads(1)
    torch.save([updates(rank, world, parts) for parts in PARTS], f"{folder}/{world}-{rank}.pt")


def main(folder: str) -> None:
    fork = multiprocessing.get_context("fork")
    for world in (1, 2):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        ranks = [fork.Process(target=work, args=(rank, world, port, folder)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert not any(rank.exitcode for rank in ranks), [rank.exitcode for rank in ranks]


if __name__ == "__main__":
    main(sys.argv[1])
