"""What VLLMServer sends, against FakeServer: whole weights file by file, and files over HTTP."""

import gc
import sys
import time
from functools import partial
from pathlib import Path

import policy_cases as cases
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from fake_server import FakeServer, hurry

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, Options
from covo_rl.engines import server_weights
from covo_rl.engines.base import EngineError
from covo_rl.engines.policy_files import WeightFiles
from covo_rl.engines.vllm_server import VLLMServer
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable

KEY = "sesame"
WHOLE = {"lora": False, "train_parts": ["encoder", "audio_adapter", "llm", "lm_head"]}
RESETS = ("/reset_prefix_cache", "/reset_encoder_cache")


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    hurry(monkeypatch)
    monkeypatch.setattr(server_weights, "WeightFiles", partial(WeightFiles, shard_bytes=40_000))
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture
def fakes():
    """Two servers of the base, whose weights are those that the policy began with."""
    made = [FakeServer(cases.policy(lora=False), key=KEY) for _ in range(2)]
    yield made
    for fake in made:
        fake.die()
        assert fake.errors == []


@pytest.fixture
def begin(tmp_path):
    engines = []

    def make(fakes, transport="folder", **adapter):
        trainable = make_trainable(cases.family(), AdapterConfig(lora_r=4, lora_alpha=8.0, **adapter))
        policy = Policy(trainable.family, trainable.peft_model, clips=ClipStore())
        options = Options()
        options.engine.vllm_server_base_url = ",".join(fake.url for fake in fakes)
        options.engine.vllm_server_timeout, options.engine.engine_patience = 20.0, 20.0
        options.engine.vllm_adapter_transport, options.engine.vllm_adapter_dir = transport, str(tmp_path / "shared")
        engines.append(VLLMServer(policy, trainable, options, max_model_len=200, probe_prompt=cases.prompts(policy)[0]))
        return policy, engines[-1]

    yield make
    for engine in engines:
        engine.close()
    gc.collect()  # of one that did not begin
    assert not list((tmp_path / "shared").glob("*")), "nothing stays"


def change(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def mismatch(engine, policy):
    """Largest difference of a few groups' log-probs from those of the scoring pass."""
    pending = engine.submit(cases.prompts(policy), cases.SMALL, seed=3, generations=2)
    groups = engine.collect(pending)
    assert len(groups) == len(pending.prompts) and engine.failed == []
    with torch.no_grad():
        scored = policy.logps(groups, policy.features([group.prompt for group in groups]))
    recorded = torch.tensor([logp for group in groups for rollout in group.rollouts for logp in rollout.logps])
    return float((scored.logps_NC[scored.mask_NC] - recorded).abs().max())


def wait(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("transport", ["folder", "http"])
def test_whole_weights_reach_every_server_in_files_and_caches_are_dropped(transport, fakes, begin):
    policy, engine = begin(fakes, transport, **WHOLE)
    for version in (1, 2):
        change(policy, version)
        assert engine.sync(version).probe_abs <= 1e-5
        assert mismatch(engine, policy) <= 1e-5
    for fake in fakes:
        sources = [asked["update_info"]["source"] for path, asked in fake.requests if path == "/update_weights"]
        assert len({*sources}) > 3
        assert {source.startswith("http://127.0.0.1:") for source in sources} == {transport == "http"}
        # random weights at the start, version 0, 1, 2
        assert fake.paths()["/finish_weight_update"] == 4 == fake.paths()[RESETS[0]] == fake.paths()[RESETS[1]]
        order = [path for path, _ in fake.requests if path in ("/finish_weight_update", *RESETS)]
        assert all(order[i] == "/finish_weight_update" for i in range(0, len(order), 3))


def test_a_restarted_server_never_answers_with_its_base(fakes, begin):
    """Its answers carry no version, and it has no name to have forgotten."""
    policy, engine = begin(fakes, **WHOLE)
    change(policy, 1)
    engine.sync(1)
    fakes[0].die()
    fakes[0].revive()
    assert mismatch(engine, policy) <= 1e-5
    wait(lambda: (engine.servers.look(), "has weights null, not " in engine.servers.all[0].problem)[1])
    assert [server.up for server in engine.servers.all] == [False, True]
    change(policy, 2)
    engine.sync(2)
    assert [server.up for server in engine.servers.all] == [True, True], "it gets the next version"
    fakes[1].die()
    assert mismatch(engine, policy) <= 1e-5


@pytest.mark.parametrize("step", ["/update_weights", "/finish_weight_update"])
def test_a_server_that_fails_in_an_update_is_left_out_until_the_next(step, fakes, begin):
    policy, engine = begin(fakes, **WHOLE)
    change(policy, 1)
    fakes[1].takes[step] = 0 if step != "/update_weights" else 2
    assert engine.sync(1).probe_abs <= 1e-5
    assert [server.up for server in engine.servers.all] == [True, False]
    assert mismatch(engine, policy) <= 1e-5
    fakes[1].takes.clear()
    change(policy, 2)
    engine.sync(2)
    assert [server.up for server in engine.servers.all] == [True, True]


def test_when_no_server_takes_the_weights_the_message_says_how_to_start_them(fakes, begin):
    _, engine = begin(fakes, **WHOLE)
    for fake in fakes:
        fake.takes["/start_weight_update"] = 0
    with pytest.raises(EngineError, match=r"no server takes the weights: .*VLLM_SERVER_DEV_MODE=1 and"):
        engine.sync(1)


def test_adapters_come_over_http(begin):
    fakes = [FakeServer(cases.policy(), key=KEY) for _ in range(2)]
    try:
        policy, engine = begin(fakes, "http")
        change(policy, 1)
        assert engine.sync(1).probe_abs <= 1e-5
        assert mismatch(engine, policy) <= 1e-5
        for fake in fakes:
            paths = [asked["lora_path"] for path, asked in fake.requests if path == "/v1/load_lora_adapter"]
            assert len(paths) == 3 and all(path.startswith("http://127.0.0.1:") for path in paths)
            assert all(KEY not in str(asked) for _, asked in fake.requests)
    finally:
        for fake in fakes:
            fake.die()
            assert fake.errors == []


def test_http_without_a_key_is_refused_before_anything_is_sent(begin, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY")
    with FakeServer(cases.policy()) as fake:
        with pytest.raises(EngineError, match="http needs VLLM_API_KEY, here and at the servers"):
            begin([fake], "http")
        assert fake.adapters == []


def test_features_of_an_older_encoder_stop_the_run(fakes, begin):
    fakes[1].keeps_features = True
    with pytest.raises(EngineError, match="nats"):
        begin(fakes, **WHOLE)
