"""How an engine of other memory gets the policy, and how it is asked whether it runs it."""

import fcntl
import json
import math
import os
import subprocess
import sys

import policy_cases as cases
import pytest
import sync_ranks_worker
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from covo_rl.config import AdapterConfig
from covo_rl.engines import memory_folder, policy_files
from covo_rl.engines.base import EngineError, Failed
from covo_rl.engines.memory_folder import MemoryFolder
from covo_rl.engines.own import OwnEngine
from covo_rl.engines.policy_files import AdapterFiles, WeightFiles
from covo_rl.engines.probe import START_VERSION, Probe, weight_noise
from covo_rl.export.adapter import load_policy_state, save_policy
from covo_rl.policy import Policy
from covo_rl.policy.entries import merged_entries
from covo_rl.policy.trainable import make_trainable


def trainable_of(name="covo_audio", **config):
    return make_trainable(cases.family(name), AdapterConfig(**{"lora_r": 4, "lora_alpha": 8.0, **config}))


def policy_of(trainable, clips=None):
    return Policy(trainable.family, trainable.peft_model, clips=clips or cases.ClipStore())


def nudge(trainable, by=0.3):
    with torch.no_grad():
        for parameter in trainable.family.model.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# -- the adapter as files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_an_adapter_is_written_as_an_export_writes_it(name, tmp_path):
    trainable = trainable_of(name)
    nudge(trainable)
    files = AdapterFiles(trainable, tmp_path / "shared")
    folder, export = files.write(3), save_policy(trainable, tmp_path / "export")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, export))
    assert folder.name == "policy-3" and folder.is_relative_to(tmp_path / "shared")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    config, expected = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, export))
    assert {k: sorted(v) if isinstance(v, list) else v for k, v in config.items()} == {
        k: sorted(v) if isinstance(v, list) else v for k, v in expected.items()
    }
    assert {path.stat().st_mode & 0o005 for path in (folder, folder.parent)} == {0o005}, "servers may be another user"


def test_every_version_has_a_folder_until_it_is_released(tmp_path):
    trainable = trainable_of()
    files = AdapterFiles(trainable, tmp_path)
    first = files.write(0)
    nudge(trainable)
    second = files.write(1)
    assert first != second and first.is_dir()
    old, new = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    assert all(torch.allclose(new[key] - old[key], torch.tensor(0.3)) for key in old)
    files.release(0)
    assert not first.exists() and second.is_dir()
    files.close()
    assert not files.folder.path.exists() and tmp_path.is_dir()


def test_a_version_is_never_two_sets_of_weights(tmp_path):
    """What an engine has loaded under a name and a path stays in its caches."""
    trainable = trainable_of()
    files = AdapterFiles(trainable, tmp_path)
    path = files.write(7)
    nudge(trainable, 0.0)  # as DDP does when it wraps the policy
    assert files.write(7) == path, "asked for again, as after a server came back"
    nudge(trainable)
    with pytest.raises(EngineError, match="policy-7 was written with other weights"):
        files.write(7)
    files.release(7)
    files.write(7)


def test_two_runs_share_no_path(tmp_path):
    """A server that outlives a run knows the adapters of the last one by their paths."""
    trainable = trainable_of()
    assert AdapterFiles(trainable, tmp_path).write(0) != AdapterFiles(trainable, tmp_path).write(0)


def test_lora_is_rounded_once_and_the_largest_change_is_known(tmp_path):
    """Above 1 the bfloat16 numbers are 1/128 apart: 1 + 1/256 lies in the middle and goes to the even one, 1."""
    trainable = trainable_of()
    with torch.no_grad():
        for parameter in trainable.family.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(1 + 1 / 256)
    files = AdapterFiles(trainable, tmp_path, dtype=torch.bfloat16)
    written = load_file(files.write(0) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert all(bool((tensor == 1).all()) for tensor in written.values()) and files.rounding == 1 / 256
    exact = AdapterFiles(trainable, tmp_path)
    exact.write(0)
    assert exact.rounding == 0.0


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    files = AdapterFiles(trainable_of(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(policy_files, "save_file", full)
        with pytest.raises(EngineError, match=r"rank 0: .*No space left on device"):
            files.write(0)
    assert not list(files.folder.path.glob("**/*.safetensors"))
    assert (files.write(0) / "adapter_model.safetensors").is_file()


def test_a_folder_without_room_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(EngineError, match=r"MB free, .* MB are needed: give another vllm_adapter_dir"):
        MemoryFolder(tmp_path, 1 << 60)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_in_memory_is_removed_and_a_living_ones_is_not(tmp_path, monkeypatch):
    """The kernel drops the lock of a killed process; an unlocked file is what it leaves."""
    monkeypatch.setattr(memory_folder, "MEMORY", tmp_path)
    alive = MemoryFolder(None, 1)
    dead, other, begun = (tmp_path / name for name in ("covo-rl-engine-dead", "elsewhere", "covo-rl-engine-begun"))
    for folder in (dead, other, begun):
        folder.mkdir()
    (dead / "lock").write_text("")
    (dead / "adapter_model.safetensors").write_bytes(b"x")
    (other / "lock").write_text("")
    third = MemoryFolder(None, 1)
    assert {path.name for path in tmp_path.iterdir()} == {
        alive.path.name, third.path.name, "elsewhere", "covo-rl-engine-begun"
    }  # fmt: skip
    with open(alive.path / "lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- whole weights -----------------------------------------------------------------------------------------------------


def test_shards_are_the_published_weights_one_file_at_a_time(tmp_path):
    trainable = trainable_of(lora=False, train_parts=["llm"])
    files, seen = WeightFiles(trainable, tmp_path, dtype=torch.bfloat16, shard_bytes=20_000), {}
    count = 0
    for path in files.shards():
        assert [p.name for p in files.folder.path.glob("*.safetensors")] == [path.name]
        part = load_file(path)
        assert not part.keys() & seen.keys()
        seen, count = seen | part, count + 1
    expected = {entry.name: entry.tensor() for entry in merged_entries(trainable.family.model, torch.bfloat16)}
    assert count > 3 and seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert not list(files.folder.path.glob("*.safetensors"))
    files.close()
    assert not files.folder.path.exists()


def test_an_adapter_is_not_sent_merged_and_weights_not_as_an_adapter(tmp_path):
    with pytest.raises(EngineError, match="small updates would vanish"):
        WeightFiles(trainable_of(), tmp_path)
    with pytest.raises(EngineError, match="sent whole"):
        AdapterFiles(trainable_of(lora=False, train_parts=["llm"]), tmp_path)


# -- the probe ---------------------------------------------------------------------------------------------------------


class Elsewhere(OwnEngine):
    """An engine of other memory: a second policy, given the adapter by files. `fault` says what it does wrong."""

    def __init__(self, trainable, tmp_path, fault=""):
        self.copy, self.files, self.fault = trainable_of(), AdapterFiles(trainable, tmp_path), fault
        super().__init__(policy_of(self.copy))

    def sync(self, version):
        folder = self.files.write(version)
        if self.fault != "no-op" and (self.fault != "stale" or version in (START_VERSION, 0)):
            load_policy_state(self.copy, folder)
        return super().sync(version)

    def collect(self, pending):
        groups = super().collect(pending)
        if self.fault == "drops":
            self.failed = [Failed(pending.prompts[0].example.id, "HTTP 500")]
            return []
        if self.fault == "nan":
            (rollout,) = groups[0].rollouts
            broken = cases.Rollout(rollout.completion_ids, (math.nan, *rollout.logps[1:]), "", rollout.stop_reason)
            return [cases.Group(groups[0].prompt, (broken,))]
        return groups


def asked(tmp_path, fault="", **kwargs):
    trainable = trainable_of()
    policy = policy_of(trainable)
    engine = Elsewhere(trainable, tmp_path, fault)
    engine.policy.clips = engine.policy.embedder.clips = policy.clips
    engine.policy.store.clips = policy.clips
    return trainable, engine, Probe(policy, cases.prompts(policy)[0], **kwargs)


def test_an_engine_with_the_policys_weights_passes_at_every_version(tmp_path):
    trainable, engine, probe = asked(tmp_path)
    assert probe.tolerance == 1e-4 and probe.check_random(engine) <= 1e-5
    for version in range(3):
        engine.sync(version)
        assert probe.check(engine, version) <= 1e-5
        nudge(trainable, 0.05)


def test_an_adapter_without_effect_passes_while_lora_is_fresh_and_not_with_random_weights(tmp_path):
    """B is zero at the start, so an engine that ignores adapters answers as the policy does; hence `check_random`."""
    trainable, engine, probe = asked(tmp_path, "no-op")
    before = trained(trainable.family.model)
    engine.sync(0)
    assert probe.check(engine, 0) <= 1e-5
    with pytest.raises(EngineError, match=r"does not run the policy: at version 1073741824 .* row row0 .*nats"):
        probe.check_random(engine)
    assert all(torch.equal(value, before[name]) for name, value in trained(trainable.family.model).items())


def test_an_adapter_that_stays_behind_stops_the_run(tmp_path):
    trainable, engine, probe = asked(tmp_path, "stale")
    probe.check_random(engine)
    engine.sync(0)
    assert probe.check(engine, 0) <= 1e-5
    nudge(trainable, 0.05)
    engine.sync(1)
    with pytest.raises(EngineError, match="the engine does not run the policy: at version 1 "):
        probe.check(engine, 1)


@pytest.mark.parametrize(
    ("fault", "message"), [("drops", "cannot sample: HTTP 500"), ("nan", "differ from the policy's by up to inf nats")]
)
def test_an_answer_that_is_none_is_no_pass(fault, message, tmp_path):
    _, engine, probe = asked(tmp_path, fault)
    engine.sync(0)
    with pytest.raises(EngineError, match=message):
        probe.check(engine, 0)


def test_the_version_is_the_one_that_was_synced(tmp_path):
    _, engine, probe = asked(tmp_path)
    engine.sync(4)
    with pytest.raises(EngineError, match="sampled with version 4, 5 was synced"):
        probe.check(engine, 5)


def test_the_tolerance_follows_the_coarser_side(tmp_path):
    _, _, probe = asked(tmp_path, dtype=torch.bfloat16)
    assert probe.tolerance == 0.3
    assert Probe(probe.policy, probe.prompt, 0.02, dtype=torch.bfloat16).tolerance == 0.02
    half = cases.policy(dtype=torch.bfloat16)
    assert Probe(half, cases.prompts(half)[0]).tolerance == 0.3


def test_a_tolerance_that_could_not_tell_is_refused(tmp_path):
    _, engine, probe = asked(tmp_path, tolerance=1e6)
    with pytest.raises(EngineError, match=r"too little to be told from engine_probe_tolerance 1e\+06"):
        probe.check_random(engine)


@pytest.mark.parametrize("config", [{}, {"lora": False, "train_parts": ["encoder", "audio_adapter", "llm"]}])
def test_random_weights_change_what_trains_alone_and_go_without_a_trace(config):
    model = trainable_of(**config).family.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with weight_noise(model) as draw:
        draw(0.1)
        once = trained(model)
        draw(0.1)
        assert all(torch.equal(value, once[name]) for name, value in trained(model).items()), "seeded"
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == set(once)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- in pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sync_ranks_worker.KINDS)
def test_a_policy_in_pieces_sends_the_same(kind, tmp_path):
    """One rank, every parameter a DTensor."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sync_ranks_worker.check(kind, tmp_path)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_policy_in_pieces_on_two_ranks_sends_the_same(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [sync_ranks_worker.__file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0 and done.stdout.count("of 2: equal") == 2, done.stderr[-4000:]
