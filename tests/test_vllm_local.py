"""An engine of vLLM in the training process, on a fake `LLM` here; on the real one in tests/serving (slow)."""

import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import fake_vllm
import numpy as np
import policy_cases as cases
import pytest
import torch
import torch.distributed as dist
from test_serve import vllm_python

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, ConfigError, Options
from covo_rl.engines import vllm_local
from covo_rl.engines.base import EngineError, EngineLost
from covo_rl.engines.probe import weight_noise
from covo_rl.engines.vllm_local import VLLMColocate
from covo_rl.engines.vllm_process import VLLMFailure
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained():
    family = cases.family()
    trainable = make_trainable(family, AdapterConfig(lora_r=4, lora_alpha=8.0))
    return Policy(family, trainable.peft_model, clips=ClipStore()), trainable


@pytest.fixture
def llms(monkeypatch):
    return fake_vllm.install(monkeypatch, cases.policy())


@pytest.fixture
def start(trained, llms, tmp_path):
    """Makes engines, and ends them."""
    engines = []

    def begin(world=1, **options):
        settings = Options()
        settings.engine.use_vllm, settings.engine.vllm_adapter_dir = True, str(tmp_path)
        vars(settings.engine).update(options)
        prompts = cases.prompts(trained[0])
        engine = VLLMColocate(*trained, settings, max_model_len=200, probe_prompt=prompts[0], world=world)
        engines.append(engine)
        return engine, prompts

    yield begin
    llms[-1].failures = 0
    for engine in engines:
        engine.close()


def collected(engine, prompts, *, seed=3, generations=2, **options):
    return engine.collect(engine.submit(prompts, cases.SMALL, seed=seed, generations=generations, **options))


def difference(policy, prompts, groups):
    with torch.no_grad():
        scored = policy.logps(groups, policy.features(prompts))
    theirs = [logp for group in groups for rollout in group.rollouts for logp in rollout.logps]
    return (scored.logps_NC[scored.mask_NC] - torch.tensor(theirs)).abs().max().item()


def test_every_version_is_sampled_with_its_own_weights_and_the_policy_is_what_it_was(trained, start):
    policy, trainable = trained
    before = [p.clone() for p in trainable.family.model.parameters()]
    engine, prompts = start()
    assert all(torch.equal(a, b) for a, b in zip(before, trainable.family.model.parameters(), strict=True))
    seen = set()
    with weight_noise(trainable.family.model) as draw:
        for version, scale in enumerate((0.5, 1.0, 2.0), 1):
            draw(scale)
            report = engine.sync(version)
            assert report.probe_abs <= 1e-4 and set(report.seconds) == {"save", "load"}
            groups = collected(engine, prompts)
            assert difference(policy, prompts, groups) <= 1e-4
            assert {r.version for group in groups for r in group.rollouts} == {version}
            seen.add(tuple(cases.ids_of(groups)))
    assert len(seen) == 3


def test_no_load_has_the_name_or_number_of_another_and_old_adapters_go(start, llms, tmp_path):
    engine, _ = start()
    for version in (1, 1, 2):  # an update that was not finite leaves the version as it was
        engine.sync(version)
    loads = [call for call in llms[0].calls if call.startswith("load")]
    assert len(loads) == len({*loads}) == 5 and sorted(llms[0].numbers) == [1, 2, 3, 4, 5]
    assert loads[-1] == "load policy-2-5"
    assert [path.parent.name for path in tmp_path.rglob("adapter_config.json")] == ["policy-2"]


def test_each_clip_is_encoded_once_for_all_rollouts_and_steps(start):
    engine, prompts = start()
    collected(engine, prompts, generations=8)
    first = engine.metrics()
    assert first["clips"] == 4 and first["encoder_runs"] == 3  # the probe has encoded its own
    assert first["prefix_hit_rate"] == pytest.approx(7 / 8)
    engine.sync(1)
    assert engine.metrics() == first | {"sample_s": engine.metrics()["sample_s"]}  # not the probe's
    collected(engine, prompts, seed=4)
    assert engine.metrics()["encoder_runs"] == 0 and engine.metrics()["prefix_hit_rate"] == pytest.approx(1 / 2)


def test_seeds_belong_to_prompts_and_greedy_ones_are_asked_for_once(start):
    engine, prompts = start()
    groups = collected(engine, prompts)
    assert collected(engine, prompts[2:]) == groups[2:] and collected(engine, prompts, seed=4) != groups
    greedy = collected(engine, prompts, greedy=True, generations=3)
    assert all(len(group.rollouts) == 3 and len({*group.rollouts}) == 1 for group in greedy)


def test_vllm_is_started_as_a_rank_of_the_launcher_with_what_was_drawn_from(start, llms):
    engine, _ = start(vllm_options="max_num_seqs=64,block_size=16")
    arguments = llms[0].arguments
    assert arguments["distributed_executor_backend"] == "external_launcher"
    assert arguments["logprobs_mode"] == "processed_logprobs" and arguments["dtype"] == "float32"
    assert (arguments["enable_lora"], arguments["max_lora_rank"], arguments["max_loras"]) == (True, 8, 1)
    assert (arguments["max_num_seqs"], arguments["block_size"]) == (64, 16)
    assert arguments["max_model_len"] == 200 <= arguments["max_num_batched_tokens"]
    assert arguments["enable_sleep_mode"] is False  # there is no sleep on a CPU
    assert engine.exact is False


def test_an_argument_that_vllm_does_not_know_is_named_before_it_starts(start, llms):
    with pytest.raises(ConfigError, match=r"vllm_options.*max_num_seq.*max_num_seqs"):
        start(vllm_options="max_num_seq=64")
    assert not llms
    llms.append(types.SimpleNamespace())  # for the fixture


def test_the_process_is_left_as_it_was(start, monkeypatch):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "7")
    threads = torch.set_num_threads
    engine, _ = start()
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert "RANK" not in os.environ and os.environ["LOCAL_RANK"] == "7" and torch.set_num_threads is threads
    assert dist.is_initialized() and dist.get_world_size() == 1
    engine.close()
    assert not dist.is_initialized()
    monkeypatch.setattr(engine, "close", lambda: None)


def test_the_launchers_process_group_outlives_the_engine(start, monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        engine, _ = start()
        engine.close()
        assert dist.is_initialized()
        monkeypatch.setattr(engine, "close", lambda: None)
    finally:
        dist.destroy_process_group()


def test_it_sleeps_while_the_policy_learns_and_wakes_for_what_comes_first(start, llms):
    engine, prompts = start()
    engine.sleeps, begun = True, len(llms[0].calls)
    collected(engine, prompts)
    engine.rest(), engine.rest()
    engine.sync(1)
    collected(engine, prompts)
    assert set(engine.seconds) == {"sample", "sleep", "wake"}  # each move counts once
    collected(engine, prompts)
    assert set(engine.seconds) == {"sample"}
    engine.rest()
    calls = [call.split()[0] for call in llms[0].calls[begun:]]
    assert calls == ["sample", "sleep", "wake", "load", "sample", "sample", "sample", "sleep"]


def test_an_engine_that_fails_is_started_again_once_with_the_newest_adapter(start, llms):
    engine, prompts = start()
    engine.sync(4)
    groups = collected(engine, prompts)
    fake_vllm.FakeLLM.failures = 1
    with pytest.warns(UserWarning, match=r"stopped while sampling: RuntimeError: CUDA error.*\\x1b.*started again"):
        assert collected(engine, prompts) == groups
    assert len(llms) == 2 and llms[0].calls[-1] == "shutdown" and llms[1].calls[:1] == ["load policy-4-3"]
    assert engine.metrics()["restarts"] == 1 and engine.metrics()["encoder_runs"] == 4
    engine.sync(5)
    fake_vllm.FakeLLM.failures = 2
    with pytest.warns(UserWarning, match="started again"), pytest.raises(EngineLost, match="started again, vLLM"):
        collected(engine, prompts)


def test_among_several_ranks_a_failed_engine_ends_the_run(start, llms):
    engine, prompts = start(world=2)
    fake_vllm.FakeLLM.failures = 1
    with pytest.raises(EngineLost, match="rank 0: vLLM: it stopped while sampling"):
        collected(engine, prompts)
    assert len(llms) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_that_dies_at_a_sync_or_on_waking_is_started_again_or_lost(start, llms, monkeypatch, world):
    """As one that dies while sampling: the weights of this step are worth a checkpoint."""
    engine, prompts = start(world=world)
    groups = collected(engine, prompts)

    def broken(*_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    llms[0].wake_up, llms[0].llm_engine.add_lora, engine.asleep = broken, broken, True
    if world > 1:
        with pytest.raises(EngineLost, match="rank 0: vLLM: it does not wake up"):
            engine.sync(1)
        return
    with pytest.warns(UserWarning, match=r"does not wake up: RuntimeError.*started again"):
        engine.sync(1)
    assert len(llms) == 2 and [r.completion_ids for g in collected(engine, prompts) for r in g.rollouts] == [
        r.completion_ids for g in groups for r in g.rollouts
    ]
    llms[1].llm_engine.add_lora = broken
    with pytest.warns(UserWarning, match=r"cannot load the adapter policy-2.*started again"):
        engine.sync(2)
    assert len(llms) == 3 and engine.restarts == 2


def test_an_adapter_that_changes_nothing_stops_the_run_before_it_begins(start, llms, monkeypatch):
    monkeypatch.setattr(fake_vllm.FakeLLM, "no_op", True)
    with pytest.raises(EngineError, match="the engine does not run the policy"):
        start()
    llms[-1].fake.die()
    dist.destroy_process_group()


def test_an_adapter_number_that_is_used_again_stops_the_run(start, trained, llms):
    engine, _ = start()
    engine.loads -= 1
    with pytest.raises(EngineError, match="adapter number 2 already"):
        engine.sync(1)


def test_an_adapter_that_is_served_stale_stops_the_run(start, trained, llms):
    engine, _ = start()
    llms[0].fake._load = lambda name, folder, in_place: llms[0].fake.weights.update(
        {name: llms[0].fake.weights["base"]}
    )
    with weight_noise(trained[1].family.model) as draw:
        draw(1.0)
        with pytest.raises(EngineError, match="at version 1 its log-probs of"):
            engine.sync(1)


def test_ranks_that_share_an_engine_ask_for_what_all_want_and_take_their_own(start, monkeypatch):
    engine, prompts = start()
    alone, counts, complete = collected(engine, prompts), [], engine.process.complete
    waiting = [engine.submit(part, cases.SMALL, seed=3, generations=2) for part in (prompts[:1], prompts[1:])]
    wanted = [([engine._request(prompt, 2) for prompt in one.prompts], one.work[0]) for one in waiting]
    group = types.SimpleNamespace(get_tp_group=lambda: types.SimpleNamespace(cpu_group=None))
    monkeypatch.setitem(sys.modules, "vllm.distributed", group)
    monkeypatch.setattr(
        vllm_local.dist, "all_gather_object", lambda parts, mine, group: parts.__setitem__(slice(2), wanted)
    )
    monkeypatch.setattr(engine.process, "complete", lambda r, *rest: counts.append(len(r)) or complete(r, *rest))
    engine.tensor_parallel, groups = 2, []
    for engine.rank, pending in enumerate(waiting):
        groups += engine.collect(pending)
    assert groups == alone and counts == [4, 4]


def test_whole_weights_go_under_their_published_names_and_what_was_computed_is_forgotten(start):
    engine, _ = start()
    asked = []
    process = engine.process
    process.llm.collective_rpc = lambda method, kwargs: asked.append((method, dict(kwargs["weights_iterator"])))
    process.llm.reset_prefix_cache = lambda: asked.append("prefix") or True
    process.llm.llm_engine.reset_encoder_cache = lambda: asked.append("encoder")
    process.load_weights(iter({"llm.lm_head.weight": torch.ones(2)}.items()))
    assert [one if isinstance(one, str) else one[0] for one in asked] == ["reload_weights", "prefix", "encoder"]
    process.llm.reset_prefix_cache = lambda: False
    with pytest.raises(VLLMFailure, match="still sampling"):
        process.load_weights(iter(()))


on_vllm = pytest.mark.skipif(vllm_python() is None, reason="set COVO_RL_VLLM_PYTHON (docs/serving.md)")


def with_vllm(*words):
    """A process in the environment with vLLM, on this checkout; what it printed."""
    variables = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [vllm_python(), *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@on_vllm
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["covo_audio", "qwen2_audio"])
def test_on_vllm_every_version_is_the_policy_and_each_fault_stops_the_run(family):
    out = with_vllm(ROOT / "tests" / "serving" / "rollouts_check.py", family)
    assert out.count(": ok") == 7 and "FAILED" not in out


@pytest.mark.slow
@on_vllm
@pytest.mark.timeout(1200)
def test_twenty_steps_on_vllm_teach_the_tiny_model(tmp_path):
    sizes = ["--max_steps", 20, "--prompts_per_step", 16, "--micro_batch_prompts", 16]
    with_vllm(
        ROOT / "recipes" / "grpo_mmau.py", "--config", ROOT / "recipes" / "configs" / "tiny.yaml", "--use_vllm",
        *sizes, "--lr_scheduler_type", "constant", "--evaluate", "false", "--output", tmp_path / "run",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    column = {name: np.array([row[name] for row in rows]) for name in rows[-1] if name != "seconds"}
    rewards = column["reward_total"]
    assert len(rows) == 20 and rewards[-3:].mean() - rewards[:3].mean() >= 0.5
    assert column["engine/max_abs"].max() <= 1e-4 and column["engine/probe_abs"].max() <= 1e-4
    assert column["engine/ess"].min() > 0.999 and not column["engine/lag"].any()
    assert (column["engine/encoder_runs"] <= column["engine/clips"]).all() and column["engine/clips"].max() == 16
    assert column["engine/prefix_hit_rate"].min() >= 0.6 and column["engine/tokens_per_s"].min() > 0
