"""A checkpoint is complete or ignored, and what comes back is what went in, bit for bit."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deaths import killed_at
from torch import nn

from covo_rl.algo.advantage import Advantages
from covo_rl.config import Options
from covo_rl.engines.base import EngineError, EngineLost
from covo_rl.models.weights import WeightsError
from covo_rl.train.batch import Batch
from covo_rl.train.checkpoint import CheckpointError, CheckpointStore, TrainState, state, tensors
from covo_rl.train.checkpoint import store as files
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip, Example, Group, Prompt, RewardTable, Rollout


def small_state(step, value=0.0, score=None, update=0):
    tensors = {"weights": {"w": torch.full((2,), float(value))}, "optimizer": {}}
    return TrainState(step, {"about": step}, tensors, {"mine": step}, {"r": torch.arange(3)}, update, score)


# -- the store ---------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(small_state(3, 0.1, score=0.5, update=2))
    assert path.name == "step_000003.002"
    loaded = store.load(path)
    assert (loaded.step, loaded.update, loaded.score, loaded.rank) == (3, 2, 0.5, {"mine": 3})
    assert loaded.shared == {"about": 3, "world": 1}
    assert torch.equal(loaded.tensors["weights"]["w"], torch.tensor([0.1, 0.1]))
    assert torch.equal(loaded.rank_tensors["r"], torch.arange(3))
    assert loaded.tensors["optimizer"] == {}


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    path = CheckpointStore(tmp_path).save(small_state(1))
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("damage", ["missing", "shorter", "flipped", "no manifest", "broken manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_refused(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    older, newer = store.save(small_state(1)), store.save(small_state(2))
    file = newer / "weights.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no manifest":
        (newer / "complete.json").unlink()
    else:
        (newer / "complete.json").write_text("{")
    path, passed_over = store.latest_valid()
    assert path == older
    assert len(passed_over) == 1 and passed_over[0].startswith("step_000002: ")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        store.load(newer)


def test_every_flipped_bit_and_every_changed_byte_of_a_manifest_is_noticed(tmp_path):
    """finding 03: all 8 bits of every byte, and blanks that JSON would not mind; the older checkpoint is taken."""
    store = CheckpointStore(tmp_path)
    older, newer = store.save(small_state(1)), store.save(small_state(2, score=0.25))
    path = newer / "complete.json"
    content = path.read_bytes()
    flips = [(place, content[place] ^ 1 << bit) for place in range(len(content)) for bit in range(8)]
    blanks = [(place, new) for place, old in enumerate(content) if old in b" " for new in b"\t\n\r"]
    for place, byte in flips + blanks:
        path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
        assert files.damage(newer), f"byte {place}: {content[place]} -> {byte}"
        if place % 50 == 0:
            assert store.latest_valid()[0] == older
    for text in (content + b" ", content + b"\n", b" " + content, b"\xef\xbb\xbf" + content, content[:-1], content * 2):
        path.write_bytes(text)
        assert files.damage(newer)
    path.write_bytes(content)
    assert not files.damage(newer) and len(flips) > 4000 and blanks


DIGEST = "0" * 64
NOT_MANIFESTS = {
    "empty": b"", "no files": b'{"files": {}}', "list": b"[]", "number": b"3", "null": b"null", "text": b'"files"',
    "not utf-8": b"\xff\xfe{}", "deep": b"[" * 200_000, "deep object": b'{"files":' * 100_000, "digits": b"9" * 5000,
    "infinite": b'{"format": 1e999, "files": {}}', "wrong types": b'{"format": 3, "files": [], "step": "x"}',
    "format list": b'{"format": [3], "files": {}}', "digest only": b'{"sha256": "%s"}' % DIGEST.encode(),
    "null digest": b'{"format": 3, "files": {}, "sha256": null}', "zeros": bytes(700), "html": b"<html></html>",
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_MANIFESTS)
def test_what_is_no_manifest_is_damage_and_no_traceback(tmp_path, what):
    """finding 03"""
    store = CheckpointStore(tmp_path)
    older, newer = store.save(small_state(1)), store.save(small_state(2))
    (newer / "complete.json").write_bytes(NOT_MANIFESTS[what])
    path, passed_over = store.latest_valid()
    assert path == older and passed_over[0].startswith("step_000002: ")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        store.load(newer)
    assert store.save(small_state(2, 0.5)) == newer and store.latest_valid()[0] == newer  # it can be written again


def test_damage_of_any_file_and_any_place_is_noticed(tmp_path):
    """finding 03: a flipped bit at places all over every file, a link to nowhere, a folder, a renamed checkpoint."""
    store = CheckpointStore(tmp_path, keep_last=9)
    older, newer = store.save(small_state(1)), store.save(small_state(2))
    saved = {path: path.read_bytes() for path in newer.iterdir() if path.name != "complete.json"}
    assert len(saved) == 5
    for path, content in saved.items():
        for place in range(0, len(content), 3):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            assert [path.name in line for line in files.damage(newer)] == [True]
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
        assert files.damage(newer) == [f"{path.name} is missing"]
        path.unlink()
        path.mkdir()
        assert files.damage(newer) == [f"{path.name} is missing"]
        path.rmdir()
        path.write_bytes(content)
    (newer / "notes.txt").write_text("a file more does no harm")
    assert not files.damage(newer)
    newer.rename(tmp_path / "step_000009")
    path, passed_over = store.latest_valid()
    assert path == older and passed_over == ["step_000009: it was saved as step_000002 and has been renamed"]
    (tmp_path / "step_000009").rename(tmp_path / "my best")  # a copy under a name of one's own is fine
    assert store.load(tmp_path / "my best").step == 2


def test_a_checkpoint_of_an_earlier_format_is_named_as_such(tmp_path):
    """finding 03: not as damage; auto passes it over with both numbers."""
    store = CheckpointStore(tmp_path)
    path = store.save(small_state(1))
    about = json.loads((path / "complete.json").read_text())
    del about["sha256"]
    (path / "complete.json").write_text(json.dumps({**about, "format": 2}))
    expected = "it has checkpoint format 2, this version reads 3"
    assert store.latest_valid() == (None, [f"step_000001: {expected}"])
    with pytest.raises(CheckpointError, match=expected):
        store.load(path)


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    """finding 02: nor does one that is a link; what a link points to is never deleted."""
    elsewhere = tmp_path / "elsewhere"
    store = CheckpointStore(tmp_path / "run", keep_last=2, keep_best=True)
    CheckpointStore(elsewhere).save(small_state(1))
    store.save(small_state(2, score=0.5))
    store.save(small_state(3))
    (store.folder / "step_000003" / "complete.json").write_text('{"score": 9}')
    (store.folder / "step_000001").symlink_to(elsewhere / "step_000001")
    store.save(small_state(4))
    assert [path.name for path in store.all()] == ["step_000002", "step_000004"]
    assert not list(store.folder.glob(".trash-*"))
    assert not files.damage(elsewhere / "step_000001")


def test_newest_goes_by_step_then_update(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=9)
    for step, update in ((9, 0), (10, 0), (10, 11), (10, 2)):
        store.save(small_state(step, update=update))
    assert [path.name for path in store.all()] == ["step_000009", "step_000010", "step_000010.002", "step_000010.011"]
    assert store.latest_valid()[0].name == "step_000010.011"


def test_keep_last_and_keep_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=True)
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.4), (4, None), (5, 0.9), (6, None)):
        store.save(small_state(step, score=score))
    # 2 and 5 share the best score: the newer one stays
    assert [path.name for path in store.all()] == ["step_000005", "step_000006"]
    store.save(small_state(7))
    assert [path.name for path in store.all()] == ["step_000005", "step_000006", "step_000007"]
    with pytest.raises(ValueError, match="at least one"):
        CheckpointStore(tmp_path, keep_last=0)


def test_an_interrupted_save_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    """Die at every single write of a save, as SIGKILL would: the older checkpoint is found each time."""
    store = CheckpointStore(tmp_path)
    older = store.save(small_state(1))
    places = [(files, name) for name in ("write_values", "write_tensors", "write_manifest", "flush")]
    places += [(tensors, "flush"), (files, "file_entries")]
    died = 0
    for number in range(1, 40):
        killed, count = killed_at(number, monkeypatch, places, lambda: store.save(small_state(2)))
        if not killed:
            break
        died += 1
        path, _ = store.latest_valid()
        # the last call flushes the folder after the rename: from then on the new one counts
        assert path == older or (number == count and path.name == "step_000002")
    assert died >= 8
    assert store.latest_valid()[0].name == "step_000002"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_full_disk_keeps_the_last_checkpoint_and_says_how_much_is_free(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(small_state(1, 0.25))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*GB free.*step_000001 is still there"):
        store.save(small_state(2))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert store.load(store.latest_valid()[0]).tensors["weights"]["w"].tolist() == [0.25, 0.25]


def test_a_real_write_error_of_the_operating_system(tmp_path):
    """A file size limit makes safetensors and json fail as a full disk does."""
    import resource

    store = CheckpointStore(tmp_path)
    store.save(small_state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = TrainState(2, {}, {"weights": {"w": torch.zeros(100_000)}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step_000002 was not saved"):
            store.save(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.latest_valid()[0].name == "step_000001"
    store.save(big)
    assert store.latest_valid()[0].name == "step_000002"


def test_a_failure_on_one_rank_is_raised_on_all(monkeypatch):
    def fails():
        raise CheckpointError("disk full")

    other = Ranks(1, 2)
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value, None])
    with pytest.raises(CheckpointError, match="rank 0: disk full"):
        other.together(fails, CheckpointError)
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value, "no room"])
    with pytest.raises(CheckpointError, match="rank 1: no room"):
        Ranks(0, 2).together(lambda: None, CheckpointError)
    other_rank = iter(["gone", EngineLost])
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value, next(other_rank)])
    with pytest.raises(EngineLost, match="rank 1: gone"):
        Ranks(0, 2).together(lambda: None, EngineError)
    both = iter([["other ids", "gone"], [EngineError, EngineLost]])
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: next(both))
    with pytest.raises(EngineError, match="rank 0: other ids; rank 1: gone") as error:
        Ranks(0, 2).together(lambda: None, EngineError)
    assert type(error.value) is EngineError, "a checkpoint and another start would not mend it"


# -- parameters, optimiser, random numbers -----------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Dropout(0.3))
    model[0].bias.requires_grad_(False)
    return model


def make_optimizer(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": trained[:1], "lr": 0.1}, {"params": trained[1:], "betas": (0.5, 0.6)}])


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 3)).square().mean() + random.random() * np.random.rand() * model[2].weight.sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("steps_before", [0, 4])
def test_training_goes_on_bit_for_bit(tmp_path, steps_before):
    model = network()
    optimizer = make_optimizer(model)
    train(model, optimizer, steps_before)
    tensors, about = state.optimizer_state(optimizer, model)
    random_about, random_tensors = state.random_state()
    files.write_values(tmp_path / "a.json", {"optimizer": about, "random": random_about})
    files.write_tensors(tmp_path / "a.safetensors", {**tensors, **random_tensors})
    weights = state.weights(model)
    expected = train(model, optimizer, 4)

    other = network(seed=1)
    other[0].bias.data.copy_(model[0].bias)  # frozen: it comes with the base model
    restored = make_optimizer(other)
    train(other, restored, 2)
    saved, all_tensors = files.read_values(tmp_path / "a.json"), files.read_tensors(tmp_path / "a.safetensors")
    state.load_weights(other, weights)
    optimizer_tensors = {k: v for k, v in all_tensors.items() if not k.startswith("random/")}
    state.load_optimizer_state(restored, other, optimizer_tensors, saved["optimizer"])
    state.load_random_state(saved["random"], all_tensors)
    assert train(other, restored, 4) == expected
    assert restored.param_groups[1]["betas"] == (0.5, 0.6)


def test_weights_are_copies_and_frozen_ones_stay_out():
    model = network()
    weights = state.weights(model)
    assert sorted(weights) == ["0.weight", "2.bias", "2.weight"]
    model[2].bias.data.add_(1)
    assert not torch.equal(weights["2.bias"], model[2].bias)


def test_a_rank_that_writes_nothing_holds_no_copies():
    """finding 06; sharded tensors, of which each rank writes its own pieces: tests/faults/test_shards.py."""
    model = network()
    optimizer = make_optimizer(model)
    train(model, optimizer, 1)
    _, about = state.optimizer_state(optimizer, model)
    assert state.weights(model, keep=False) == {}
    assert state.optimizer_state(optimizer, model, keep=False) == ({}, about)


def test_wrappers_do_not_change_names():
    def name_of(path):
        """The name under which a parameter that sits there is saved."""
        module = nn.Module()
        *parents, last = path.split(".")
        module.register_parameter(last, nn.Parameter(torch.zeros(1)))
        for parent in reversed(parents):
            outer = nn.Module()
            outer.add_module(parent, module)
            module = outer
        return list(state.weights(module))

    assert name_of("module.base_model._orig_mod.layers.0.weight") == ["base_model.layers.0.weight"]
    assert name_of("_checkpoint_wrapped_module.a.b") == ["a.b"]


def test_a_checkpoint_of_another_model_is_refused_by_name():
    model = network()
    weights = state.weights(model)
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: extra \(1\)"):
        state.load_weights(model, weights | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"only in the model: 2.bias"):
        state.load_weights(model, {k: v for k, v in weights.items() if k != "2.bias"})
    with pytest.raises(CheckpointError, match=r"2.bias is \(5,\) in the checkpoint and \(2,\)"):
        state.load_weights(model, weights | {"2.bias": torch.zeros(5)})
    tensors, about = state.optimizer_state(make_optimizer(model), model)
    about["groups"].reverse()
    with pytest.raises(CheckpointError, match="groups differ"):
        state.load_optimizer_state(make_optimizer(model), model, tensors, about)


# -- rollouts in use ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_resumed_from(value):
    """finding 25: NaN in a checkpoint's weights or moments was loaded, and every later update skipped."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    before, (moments, about) = state.weights(model), state.optimizer_state(optimizer, model)
    spoiled = {name: tensor.clone() for name, tensor in before.items()}
    spoiled["bias"][1] = value
    with pytest.raises(WeightsError, match=r"checkpoint's weights: NaN or infinite numbers in 1 \(bias \(float32\)\)"):
        state.load_weights(model, spoiled)
    assert all(torch.equal(before[name], now) for name, now in state.weights(model).items())
    name = next(name for name in moments if name.endswith("exp_avg_sq"))
    with pytest.raises(WeightsError, match=rf"optimiser: NaN or infinite numbers in 1 \({name}"):
        state.load_optimizer_state(optimizer, model, moments | {name: moments[name] * value}, about)
    state.load_optimizer_state(optimizer, model, moments, about)


def test_a_batch_in_use_comes_back_equal(tmp_path):
    rows = [Example("a", (Clip(path="x.wav"),), "q"), Example("b", (), "q2")]
    prompts = {row.id: Prompt(row, (), "text", (1, 2, 3), ("key",), (1,)) for row in rows}
    rollouts = (Rollout((5, 1), (-0.1, -1 / 3), "<think>é", "stop", "é", None, ("no answer",)),
                Rollout((7,), (-2e-9,), "", "length"))  # fmt: skip
    batch = Batch(
        [Group(prompts["b"], rollouts), Group(prompts["a"], rollouts[::-1])],
        RewardTable(("r",), np.ones(1), np.array([[[1.0], [np.nan]]] * 2), np.array([[1.0, np.nan]] * 2),
                    {(0, 1, "r"): "why"}, {"r": 0.5}, {"m": 1.0}, {"extra": [1, "two", None, 4]}),
        Advantages(np.array([[0.1, -0.1]] * 2), np.array([True, False]), np.array([[1.0, np.nan]] * 2), {"reward": 1}),
        old_logps=[torch.randn(2, 2), torch.randn(2, 2)],
    )  # fmt: skip
    about, tensors = state.pack_batch(batch)
    files.write_values(tmp_path / "b.json", about)
    files.write_tensors(tmp_path / "b.safetensors", tensors)
    saved, device = files.read_values(tmp_path / "b.json"), torch.device("cpu")
    back = state.unpack_batch(saved, files.read_tensors(tmp_path / "b.safetensors"), prompts.__getitem__, device)
    assert back.groups == batch.groups and back.ref_logps is None
    assert all(torch.equal(a, b) for a, b in zip(back.old_logps, batch.old_logps, strict=True))
    for name in ("names", "missing", "seconds", "metrics", "extras"):
        assert getattr(back.table, name) == getattr(batch.table, name)
    for name in ("weights_R", "rewards_PGR", "rewards_PG"):
        np.testing.assert_array_equal(getattr(back.table, name), getattr(batch.table, name))
    np.testing.assert_array_equal(back.advantages.advantages_PG, batch.advantages.advantages_PG)
    np.testing.assert_array_equal(back.advantages.informative_P, batch.advantages.informative_P)
    changed = Prompt(rows[0], (), "text", (1, 2), ("key",), (1,))
    with pytest.raises(CheckpointError, match=r"row b: its prompt had 3 tokens .* and has 2 now"):
        state.unpack_batch(saved, tensors, lambda name: changed, device)


def test_only_periodic_saves_that_worked_are_announced(tmp_path, monkeypatch):
    """Exports are written at these; the last checkpoint of a run is exported as its result."""
    options = Options()
    options.train.checkpoint_every = 2
    announced = []
    saver = Saver(options, tmp_path, on_saved=announced.append)
    trainer = SimpleNamespace(step=0)

    def save(trainer, score):
        if trainer.step == 4:
            raise CheckpointError("no space left")
        return tmp_path / f"step_{trainer.step}"

    monkeypatch.setattr(saver, "_save", save)
    for trainer.step in range(1, 8):
        saver.after_step(trainer)
    saver.finish(trainer)
    assert [path.name for path in announced] == ["step_2", "step_6"]
    assert saver.failures == 1
