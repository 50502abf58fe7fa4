"""Checkpoints of two FSDP2 ranks: each writes and reads its own pieces, which together are the whole, bit for bit."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shard_ranks
import torch
from safetensors.torch import load_file
from shard_ranks import settings

sys.path.insert(0, str(Path(__file__).parents[1]))
import policy_cases
import train_cases

from covo_rl.export import ExportError
from covo_rl.export.adapter import open_policy
from covo_rl.export.merged import write_merged
from covo_rl.policy.sharding import TensorPiece, TensorPieces
from covo_rl.train.checkpoint import CheckpointError, CheckpointStore, state
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.checkpoint.tensors import saved_tensors, write_tensors

ROOT = Path(__file__).parents[2]
SHARDS = [f"{stem}.{rank:05d}.safetensors" for stem in ("optimizer", "weights") for rank in (0, 1)]


def last(runs: Path, kind: str, run: str = "undisturbed") -> Path:
    return runs / kind / run / "checkpoints" / "step_000002"


def joined(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint."""
    values = saved_tensors(folder, stem, os.listdir(folder))
    return {name: value[tuple(slice(0, size) for size in value.shape)] for name, value in values.items()}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def no_rank_ever_holds_more_than_its_own_piece(runs, kind):
    """Of all that saving and resuming computed, evaluated parameters and moments included."""
    for rank in (0, 1):
        about = json.loads((runs / f"rank_{rank}.json").read_text())[kind]
        assert about["touched"] == about["piece"], about
        assert about["piece"] == about["whole"] / 2 == about["gathering"] / 2, "the measure sees a gathered tensor"


def each_rank_writes_its_own_half(runs, kind):
    folder = last(runs, kind)
    assert sorted(path.name for path in folder.glob("*.safetensors") if "rank" not in path.name) == SHARDS
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    for stem in ("optimizer", "weights"):
        sizes = [(folder / name).stat().st_size for name in SHARDS if name.startswith(stem)]
        assert max(sizes) < 0.6 * sum(sizes)
    assert set(json.loads((folder / "complete.json").read_text())["files"]) >= set(SHARDS)


def two_ranks_resume_bit_for_bit(runs, kind):
    """Weights and moments a step after the resume."""
    ours, theirs = last(runs, kind, "resumed"), last(runs, kind)
    for name in SHARDS:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    first = joined(runs / kind / "undisturbed" / "checkpoints" / "step_000001", "weights")
    assert not any(torch.equal(first[name], value) for name, value in joined(theirs, "weights").items())


def pieces_are_the_gathered_weights_and_one_process_resumes_from_them(runs, kind, tmp_path):
    folder = last(runs, kind)
    gathered = load_file(runs / kind / "gathered.safetensors")
    equal(joined(folder, "weights"), gathered)
    made = train_cases.trainer(settings(tmp_path, shard_ranks.CASES[kind]))
    notes = Saver(settings(tmp_path, shard_ranks.CASES[kind]), tmp_path).resume(made, str(folder))
    assert any(note.startswith("saved by 2 ranks, now 1") for note in notes)
    equal(state.weights(made.policy), gathered)
    moments, _ = state.optimizer_state(made.optimizer, made.policy)
    equal(moments, joined(folder, "optimizer"))
    assert len(moments) == 3 * len(gathered)


def one_process_opens_them_for_export(runs, kind, tmp_path):
    (tmp_path / "base").mkdir(parents=True)
    write_merged(policy_cases.family(), tmp_path / "base")
    copy = tmp_path / "checkpoint"
    shutil.copytree(last(runs, kind), copy)
    model = open_policy(copy, base_model=str(tmp_path / "base")).modes.family.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gathered = load_file(runs / kind / "gathered.safetensors")
    prefix = "model.base_model.model." if kind == "lora" else "model."
    equal(trained, {name.removeprefix(prefix): value for name, value in gathered.items()})
    (copy / "weights.00001.safetensors").unlink()
    with pytest.raises(ExportError, match=r"checkpoint is damaged: weights\.00001\.safetensors is missing"):
        open_policy(copy, base_model=str(tmp_path / "base"))
    (copy / "complete.json").unlink()
    with pytest.raises(CheckpointError, match=r"pieces of .* are missing"):
        open_policy(copy, base_model=str(tmp_path / "base"))


def a_damaged_or_missing_shard_is_refused_and_passed_over(runs, name, tmp_path):
    shutil.copytree(runs / "lora" / "undisturbed" / "checkpoints", tmp_path, dirs_exist_ok=True)
    store, shard = CheckpointStore(tmp_path), tmp_path / "step_000002" / name
    content = shard.read_bytes()
    for place in (9, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=rf"{name} has changed"):
            store.meant(str(tmp_path / "step_000002"))
    shard.unlink()
    path, passed_over = store.meant("auto")
    assert path == tmp_path / "step_000001" and passed_over == [f"step_000002: {name} is missing"]


def test_any_box_of_any_cutting_is_what_a_slice_of_the_whole_is():
    """Three dimensions, cut anywhere in each, empty pieces too; a piece that is missing, or twice there, shows."""
    draw, shape = random.Random(0), (5, 7, 3)
    whole = torch.randn(shape)
    for _ in range(50):
        edges = [[0, *sorted(draw.choices(range(size + 1), k=draw.randint(0, 3))), size] for size in shape]
        boxes = list(itertools.product(*(itertools.pairwise(some) for some in edges)))
        pieces = [
            TensorPiece(whole[tuple(slice(*side) for side in box)], [low for low, _ in box], shape) for box in boxes
        ]
        draw.shuffle(pieces)
        cut = TensorPieces(pieces)
        assert cut.complete and cut.shape == whole.shape
        wanted = tuple(slice(*sorted(draw.choices(range(size + 1), k=2))) for size in shape)
        assert torch.equal(cut[wanted], whole[wanted])
        full = next(piece for piece in pieces if piece.tensor.numel())
        assert (
            not TensorPieces([*pieces, full]).complete
            and not TensorPieces([TensorPiece(full.tensor[:0], [0, 0, 0], shape)]).complete
        )


@pytest.mark.parametrize(
    "files",
    [
        [([0], 2), ([4], 4), ([4], 2)],  # of two ranks and of four: as many elements as the whole, and a gap
        [([0], 4), ([8], 4)],
        [([-4], 4), ([4], 4)],
        [([0], 4), ([4], 4, torch.bfloat16)],
        [([0, 0], 4), ([4, 0], 4)],
        [(None, 8), ([0], 4), ([4], 4)],  # whole as well
        [(None, 8), (None, 8)],
    ],
)
def test_pieces_that_do_not_make_a_tensor_are_refused(files, tmp_path):
    for rank, (start, size, *dtype) in enumerate(files):
        tensor = torch.ones(size, dtype=dtype[0] if dtype else torch.float32)
        value = tensor if start is None else TensorPiece(tensor, start, (8,))
        write_tensors(tmp_path / f"weights.{rank:05d}.safetensors", {"a": value})
    with pytest.raises(
        CheckpointError, match=r"the pieces of a \(1\) do not make a tensor: some are missing, or files"
    ):
        saved_tensors(tmp_path, "weights", os.listdir(tmp_path))


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_two_ranks_save_and_resume_by_shard(precision, tmp_path):
    """One launch of shard_ranks.py: by kind an undisturbed and a resumed run, and the gathered weights."""
    runs = tmp_path / "runs"
    runs.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2",
               "--mixed_precision", precision, "--main_process_port", "0", "--config_file",
               str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"), shard_ranks.__file__, str(runs)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for kind in shard_ranks.CASES:
        no_rank_ever_holds_more_than_its_own_piece(runs, kind)
        each_rank_writes_its_own_half(runs, kind)
        two_ranks_resume_bit_for_bit(runs, kind)
        pieces_are_the_gathered_weights_and_one_process_resumes_from_them(runs, kind, tmp_path / kind)
        one_process_opens_them_for_export(runs, kind, tmp_path / kind)
    for name in SHARDS:
        a_damaged_or_missing_shard_is_refused_and_passed_over(runs, name, tmp_path / name)
