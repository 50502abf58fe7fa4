"""Started by test_pretrain_ranks.py: two gloo ranks, forked after the imports, and one process beside them.

    python pretrain_ranks_worker.py FOLDER [MODE ...]         of MODES; default: all

With FOLDER/config.yaml whole runs too. Writes FOLDER/MODE-RANK.pt and FOLDER/MODE/, the run.
"""

from __future__ import annotations

import faulthandler
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
from covo_rl.supervised.pretrain.run import run_pretraining
from covo_rl.supervised.pretrain.trainer import PretrainTrainer
from covo_rl.train.launch import join

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip
MODES = {"alone": (1, {}), "ddp": (2, {}), "fsdp2": (2, FSDP2)}
PARTS = (["audio_adapter", "llm", "lm_head"], ["audio_adapter"])
#: after which a rank that waits says where, and ends
PATIENCE = 240


def updates(family) -> dict[str, list]:
    """Of each update what either of two ranks computes, or one process in two passes."""
    documents = cases.mixed(family)
    sound, text = [documents[:1] + documents[2:]], [documents[1:2]]

    def packed(rows, *, silenced=False):
        batch = cases.packed(family, rows, 420)
        if silenced:
            batch.labels.fill_(IGNORE)
        return batch

    return {
        "clips on one rank": [packed(sound), packed(text)],
        "labels on the other rank alone": [packed(sound, silenced=True), packed(text)],
        "neither clips nor labels on a rank": [packed(text, silenced=True), packed(sound)],
        "no label at all": [packed(sound, silenced=True), packed(text, silenced=True)],
        "clips on no rank": [packed(text), packed(text)],
        "clips on the other rank": [packed(text), packed(sound)],
    }


def trained(rank: int, world: int, parts: list[str]) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """The lines of metrics of the updates, and the weights after all of them."""
    family = cases.tiny_family()
    config = read_pretrain(None, {
        "model": "m", "tasks": {"asr": {}}, "learning_rate": 1e-3, "steps": 9, "length": 420, "train_parts": parts,
    })  # fmt: skip
    trainer = PretrainTrainer(config, family, None, join())  # pyright: ignore[reportArgumentType]
    lines = {name: trainer.update(batches if world == 1 else batches[rank : rank + 1])
             for name, batches in updates(family).items()}  # fmt: skip
    return lines, {name: whole(tensor).clone() for name, tensor in family.model.state_dict().items()}


def rank_of(mode: str, rank: int, port: int, folder: Path) -> None:
    world, environment = MODES[mode]
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}  # fmt: skip
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.save([trained(rank, world, parts) for parts in PARTS], folder / f"{mode}-{rank}.pt")
    if (folder / "config.yaml").exists():
        whole_run(folder, mode, world)


def whole_run(folder: Path, mode: str, world: int, *, resume: bool = False) -> None:
    options = {"gradient_accumulation_steps": 3 - world, "output": str(folder / mode), "resume": resume}
    run_pretraining(read_pretrain(folder / "config.yaml", options))


def resumed(folder: Path, mode: str) -> None:
    """One process goes on where two stopped; the newest checkpoint is damaged, so that there is something to do."""
    (folder / mode / "checkpoints" / "step_000004" / "weights.safetensors").write_bytes(b"")
    whole_run(folder, mode, 1, resume=True)


def started(*works) -> None:
    ranks = [multiprocessing.get_context("fork").Process(target=work, args=given) for work, *given in works]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"{works}: {[rank.exitcode for rank in ranks]}")


def main(folder: Path, modes: list[str]) -> None:
    torch.set_num_threads(1)
    for mode in modes or MODES:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        started(*((rank_of, mode, rank, port, folder) for rank in range(MODES[mode][0])))
        print(f"{mode}: done", flush=True)
        if mode != "alone" and (folder / "config.yaml").exists():
            started((resumed, folder, mode))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
