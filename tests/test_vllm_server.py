"""The engine on vLLM servers, against FakeServer: every row of the fault table, no group lost uncounted, none twice."""

import subprocess
import sys
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path

import policy_cases as cases
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from fake_server import FakeServer, Refused, hurry
from test_serve import vllm_python

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, Options
from covo_rl.engines import servers
from covo_rl.engines.base import EngineError, EngineLost
from covo_rl.engines.vllm_server import VLLMServer
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable

CONFIG = cases.SMALL


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def parts():
    """(policy, what trains), with a LoRA that is not zero."""
    trainable = make_trainable(cases.family(), AdapterConfig(lora_r=4, lora_alpha=8.0))
    policy = Policy(trainable.family, trainable.peft_model, clips=ClipStore())
    change(policy)
    return policy, trainable


@pytest.fixture
def start():
    made = []

    def begin(**options):
        made.append(FakeServer(cases.policy(), **options))
        return made[-1]

    yield begin
    for server in made:
        server.die()
        assert server.errors == []


@pytest.fixture
def engine(parts):
    made = []

    def make(*fakes, rank=0, max_model_len=200, sent=True, **options):
        policy, trainable = parts
        settings = Options()
        settings.engine.vllm_server_base_url = ",".join(fake.url for fake in fakes)
        for name, value in {"vllm_server_timeout": 20.0, "engine_patience": 20.0, **options}.items():
            setattr(settings.engine, name, value)
        made.append(VLLMServer(policy, trainable if sent else None, settings, max_model_len=max_model_len,
                               probe_prompt=prompts_of(policy)[0], rank=rank))  # fmt: skip
        return made[-1]

    yield make
    for one in made:
        one.close()


def change(policy, seed=0):
    """Another policy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.family.model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def ask(engine, seed=1, generations=3):
    return engine.submit(prompts_of(engine.policy), CONFIG, seed=seed, generations=generations)


@cache
def prompts_of(policy):
    """The same objects every time, which makes groups comparable."""
    return tuple(cases.prompts(policy))


def difference(policy, groups):
    """Largest difference of the recorded log-probs from those of the scoring pass."""
    with torch.no_grad():
        scored = policy.logps(groups, policy.features([group.prompt for group in groups]))
    recorded = torch.tensor([logp for group in groups for rollout in group.rollouts for logp in rollout.logps])
    return float((scored.logps_NC[scored.mask_NC] - recorded).abs().max())


def test_groups_are_those_of_the_policy_that_was_synced(parts, start, engine):
    policy, _ = parts
    one, two = start(key="sesame"), start(key="sesame")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", " sesame\n")
        made = engine(one, two)
    for version in (1, 2, 3):
        change(policy, version)
        report = made.sync(version)
        assert report.version == version and report.probe_abs < 1e-4 and set(report.seconds) == {"save", "load"}
        groups = made.collect(ask(made, seed=version))
        assert {rollout.version for group in groups for rollout in group.rollouts} == {version}
        assert difference(policy, groups) < 1e-5
    assert groups == made.collect(ask(made, seed=3))  # the same seed, the same groups
    # a clip is sent whenever it is asked about, and encoded once; two versions stay, older ones are forgotten
    clips = {key for group in groups for key in group.prompt.clip_keys}
    assert one.encoded == len(clips) and len(one.adapters) == len(two.adapters) == 2
    assert made.metrics()["servers_up"] == 2 and made.failed == []
    made.close()
    assert one.adapters == two.adapters == [] and not made.sender.files.folder.path.exists()


def test_submit_returns_at_once_and_what_was_asked_keeps_its_version(parts, start, engine):
    policy, _ = parts
    server = start(delay=2)
    made = engine(server)
    begun = time.perf_counter()
    pending = ask(made)
    assert time.perf_counter() - begun < 2
    change(policy, 5)
    made.sync(1)
    groups = made.collect(pending)
    assert {rollout.version for group in groups for rollout in group.rollouts} == {0}
    change(policy, 6)
    assert difference(policy, groups) > 1e-3


def test_every_rank_asks_its_own_server_first():
    urls = ["http://a", "http://b", "http://c"]
    ordered = [servers.Servers(urls, lambda server: None, first=rank) for rank in (0, 1, 5)]
    assert [made.ask(lambda server: server.url) for made in ordered] == ["http://a", "http://b", "http://c"]


# -- faults that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "drop", "half", "cut", "huge"])
def test_a_fault_is_tried_again_on_the_same_server(start, engine, fault):
    """Row 1: twice; then the answers are those of a server without faults."""
    server = start()
    made = engine(server)
    expected = made.collect(ask(made))
    server.answered.clear()
    server.faults = [fault, fault]
    assert made.collect(ask(made)) == expected
    assert made.metrics()["retries"] == 2 and made.servers.up and made.failed == []
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("fault", ["500", "drop", "hang"])
def test_after_three_tries_another_server_is_asked(start, engine, fault, capsys):
    """Row 1: and the first one counts as down, until it is well, synced and probed."""
    one, two = start(), start()
    made = engine(one, two, vllm_server_timeout=0.7 if fault == "hang" else 20.0)
    expected = made.collect(ask(made))
    one.always = fault
    assert made.collect(ask(made)) == expected and made.failed == []
    assert [server.up for server in made.servers.all] == [False, True]
    assert f"rollout server down: {one.url}" in capsys.readouterr().err
    one.always = ""
    wait(lambda: (made.servers.look(), len(made.servers.up) == 2)[1])
    assert f"rollout server up again: {one.url}" in capsys.readouterr().err


def wait(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_that_comes_back_is_synced_and_probed_before_it_is_asked(parts, start, engine):
    """Row 1: down at a sync, back with nothing; a row that was asked for in between is answered elsewhere, once."""
    policy, _ = parts
    one, two = start(), start()
    made = engine(one, two)
    one.die()
    change(policy, 7)
    made.sync(1)
    groups = made.collect(ask(made))
    assert len(groups) == 4 and made.metrics()["servers_up"] == 1 and difference(policy, groups) < 1e-5
    one.requests.clear()
    one.revive()
    wait(lambda: (made.servers.look(), len(made.servers.up) == 2)[1])
    assert [path for path, _ in one.requests] == [
        "/health", "/v1/models", "/v1/load_lora_adapter", "/v1/load_lora_adapter", "/inference/v1/generate",
    ]  # fmt: skip
    assert made.collect(ask(made)) == groups and one.answered


def test_one_that_comes_back_amid_a_sync_is_not_asked_before_it_is_compared(start, engine, monkeypatch):
    """Row 1: the probe asked those that were up; this one has the adapter, and nobody has seen its base."""
    one, two = start(), start()
    made = engine(one, two)
    away, insist = made.servers.all[0], made.servers.insist
    made.servers.take_down(away, away.life, "away")
    away.look_at = float("inf")

    def returning(server, request):
        answer = insist(server, request)
        if request == made.everyone._ask:
            made.servers.bring_up(away)
        return answer

    monkeypatch.setattr(made.servers, "insist", returning)
    made.sync(1)
    assert not away.up
    wait(lambda: (made.servers.look(), away.up)[1])
    assert one.requests[-1][0] == "/inference/v1/generate"


def test_a_rank_without_prompts_gets_no_groups(start, engine):
    made = engine(start())
    pending = made.submit([], CONFIG, seed=1, generations=3)
    assert pending.ready(0) and made.collect(pending) == [] and made.failed == []


def test_a_server_that_has_changed_its_key_keeps_no_run_from_its_end(start, engine, monkeypatch):
    server = start()
    made = engine(server)
    folder = made.sender.files.folder.path
    assert folder.is_dir()
    server.key = "changed"
    made.close()
    assert not folder.exists()


def test_one_that_comes_back_as_another_model_stays_down(start, engine):
    one, two = start(), start()
    made = engine(one, two)
    one.die()
    made.collect(ask(made))
    one.policy = cases.policy(seed=9)
    one.revive()
    wait(lambda: (made.servers.look(), "does not run the policy" in made.servers.all[0].problem)[1])
    assert made.collect(ask(made)) and not made.servers.all[0].up


def test_a_restart_that_nobody_noticed_loses_nothing(start, engine):
    """It is well, and has forgotten the adapter: 404."""
    server = start()
    made = engine(server)
    expected = made.collect(ask(made))
    server.weights = {"base": server.weights["base"]}
    assert made.collect(ask(made)) == expected and made.failed == []


def test_death_and_return_while_all_wait_lose_and_double_nothing(start, engine):
    """Row 2: within `engine_patience`."""
    server = start(delay=0.02)
    made = engine(server)
    expected = made.collect(ask(made))
    server.answered.clear()
    pending = ask(made)
    time.sleep(0.03)
    server.die()
    threading.Timer(0.4, server.revive).start()
    assert made.collect(pending) == expected and made.failed == []


def test_when_nothing_answers_any_more_the_engine_is_lost(start, engine):
    """Row 2: after `engine_patience`; the loop saves a checkpoint and exits with 75."""
    one, two = start(), start()
    made = engine(one, two, engine_patience=0.3)
    one.die(), two.die()
    begun = time.monotonic()
    with pytest.raises(EngineLost, match=r"engine_patience = 0\.3 s: .*refused.*; .*refused"):
        made.collect(ask(made))
    assert time.monotonic() - begun < 5
    with pytest.raises(EngineLost):
        made.sync(1)


# -- requests that fail ------------------------------------------------------------------------------------------------


def test_a_request_that_fails_everywhere_is_counted_and_the_others_come(start, engine):
    """Row 3, of a server that refuses it: its group is missing, and named."""
    one, two = start(), start()
    made = engine(one, two)
    expected = made.collect(ask(made))
    longest = max(len(group.prompt.input_ids) for group in expected)
    for fake in (one, two):
        fake.max_model_len = longest + CONFIG.max_completion_length - 1
    groups = made.collect(ask(made))
    lost = [group.prompt.example.id for group in expected if len(group.prompt.input_ids) == longest]
    assert groups == [group for group in expected if group.prompt.example.id not in lost]
    assert [failed.row for failed in made.failed] == lost and len(lost) == 1
    assert "HTTP 400" in made.failed[0].reason and "maximum context length" in made.failed[0].reason
    assert len(made.servers.up) == 2


def test_a_request_that_kills_servers_does_not_kill_them_all(start, engine, monkeypatch):
    """Row 3, of servers that fail on it: three lives at most, and the others' groups come."""
    one, two = start(), start()
    made = engine(one, two)
    expected = made.collect(ask(made))
    poison = expected[1].prompt.input_ids
    for fake in (one, two):

        def kill(prompt, how, name, sample=fake._sample):
            if prompt.input_ids == poison and how["n"] == 3:
                raise Refused(500, "EngineCore encountered an issue")
            return sample(prompt, how, name)

        monkeypatch.setattr(fake, "_sample", kill)
    groups = made.collect(ask(made))
    assert groups == [group for group in expected if group.prompt.input_ids != poison]
    assert [failed.row for failed in made.failed] == [expected[1].prompt.example.id]
    assert "EngineCore encountered an issue" in made.failed[0].reason


# -- answers of another policy ---------------------------------------------------------------------------------------


def test_an_answer_of_another_version_is_thrown_away_and_asked_for_once_more(start, engine):
    """Row 4."""
    server = start()
    made = engine(server)
    expected = made.collect(ask(made))
    server.faults = ["wrong model"]
    assert made.collect(ask(made)) == expected
    server.faults = ["wrong model", "", "wrong model"]  # the second is what it is compared by when it comes back
    one = made.submit(prompts_of(made.policy)[:1], CONFIG, seed=1, generations=3)
    with pytest.raises(EngineError, match=r"asked twice: .*answered as 'policy-of-yesterday', not as policy-"):
        made.collect(one)
    assert server.faults == []


@pytest.mark.parametrize(("fault", "message"), [
    ("nan", "log-probs that are not finite|HTTP 500"),
    ("no logprob", "log-probs that are not finite"),
    ("wrong ids", "the engine used another prompt"),
    ("short", "2 rollouts, 3 were asked for"),
])  # fmt: skip
def test_what_is_no_answer_of_the_policy_stops_the_run(start, engine, fault, message):
    """Row 5: never repaired, never asked again."""
    server = start()
    made = engine(server)
    server.faults = [fault]
    with pytest.raises(EngineError, match=rf"row row\d.*({message})"):
        made.collect(ask(made))


def test_an_adapter_that_changes_nothing_stops_the_run_at_the_start(start, engine):
    """A fresh LoRA is zero: without the check with random weights nobody would notice."""
    server = start()
    server.no_op = True
    with pytest.raises(EngineError, match="does not run the policy"):
        engine(server)


def test_weights_of_an_older_version_stop_the_run_at_the_sync(parts, start, engine):
    """Under the right name: a cache, or an id that was used again."""
    policy, _ = parts
    server = start()
    made = engine(server)
    change(policy, 3)
    server.always = "stale"
    with pytest.raises(EngineError, match="does not run the policy"):
        made.sync(1)


def test_one_server_of_two_that_does_not_run_the_policy_is_named(parts, start, engine):
    policy, _ = parts
    one, two = start(), start()
    made = engine(one, two)
    change(policy, 3)
    two.always = "stale"
    with pytest.raises(EngineError, match=rf"{one.url} and {two.url} answer the same prompt .* nats apart"):
        made.sync(1)


def test_a_damaged_encoder_cache_is_not_tried_again_until_the_server_was_restarted(start, engine, capsys):
    """Last row: it is well by its own account, and stays down."""
    one, two = start(), start()
    made = engine(one, two)
    expected = made.collect(ask(made))
    one.faults = ["miss"]
    assert made.collect(ask(made)) == expected
    assert "restart it" in capsys.readouterr().err
    one.requests.clear()
    wait(lambda: (made.servers.look(), one.paths()["/v1/models"] >= 2)[1])
    assert not made.servers.all[0].up and not one.paths()["/inference/v1/generate"]
    one.die(), one.revive()
    wait(lambda: (made.servers.look(), made.servers.all[0].up)[1])


# -- before training ---------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_said_before_anything_is_sampled(start, engine, monkeypatch):
    server = start(max_model_len=64)
    with pytest.raises(EngineError, match=r"has room for 64 positions.*--max-model-len 65"):
        engine(server, max_model_len=65)
    server.max_model_len, server.version = 4096, "0.30.1"
    with pytest.raises(EngineError, match=r"is vLLM 0\.30\.1, not 0\.31"):
        engine(server)
    server.version = "0.31.0"

    def refuse(*_):
        raise Refused(500, "LoRA rank 4 is greater than max_lora_rank 2")

    monkeypatch.setattr(server, "_load", refuse)
    with pytest.raises(EngineError, match=r"no server takes the adapter: .*LoRA rank 4.*--max-lora-rank"):
        engine(server)
    server.die()
    with pytest.raises(EngineError, match=r"no answer from 1 of 1 rollout servers: .*refused.*rollout-server"):
        engine(server)


def test_the_key_is_sent_and_never_shown(start, engine, monkeypatch):
    server = start(key="sesame-open")
    for key in ("", "another"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(EngineError, match=r"HTTP 401.*is VLLM_API_KEY the key") as refused:
            engine(server)
        assert "another" not in str(refused.value)
    monkeypatch.setenv("VLLM_API_KEY", "two words")
    with pytest.raises(EngineError, match="VLLM_API_KEY: holds") as refused:
        engine(server)
    assert "words" not in str(refused.value).replace("other characters", "")
    monkeypatch.setenv("VLLM_API_KEY", "sesame-open")
    made = engine(server)

    def repeat(*_):
        raise Refused(500, "no such key: sesame-open \x1b[31m")

    monkeypatch.setattr(server, "_generate", repeat)
    made.servers.patience = 0.2
    with pytest.raises(EngineLost) as lost:
        made.collect(ask(made))
    assert "sesame" not in str(lost.value) and "***" in str(lost.value) and "\x1b" not in str(lost.value)


def test_the_base_is_served_where_nothing_trains(parts, start, engine):
    policy, _ = parts
    with torch.no_grad():
        for name, parameter in policy.family.model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    server = start()
    made = engine(server, sent=False)
    assert difference(policy, made.collect(ask(made))) < 1e-5 and not server.paths()["/v1/load_lora_adapter"]


def test_many_faults_at_random_lose_no_row_and_double_none(start, engine):
    """Three servers, faults in a third of all answers, deaths and returns: every group comes once, and is right."""
    fakes = [start(delay=0.005) for _ in range(3)]
    made = engine(*fakes, vllm_server_timeout=0.6)
    expected = {seed: made.collect(ask(made, seed)) for seed in range(4)}
    generator = torch.Generator().manual_seed(0)

    def choose(count):
        return int(torch.randint(count, (1,), generator=generator))

    kinds = ["500", "drop", "half", "cut", "hang", "", "", "", "", "", "", ""]
    for seed, groups in expected.items():
        for fake in fakes:
            fake.faults = [kinds[choose(len(kinds))] for _ in range(20)]
        pending = ask(made, seed)
        victim = fakes[choose(3)]
        time.sleep(0.01)
        victim.die()
        again = made.collect(pending)
        lost = Counter(failed.row for failed in made.failed)
        assert [group for group in groups if group.prompt.example.id not in lost] == again
        assert len(again) + lost.total() == len(groups)
        victim.faults = []
        victim.revive()


def test_an_answer_that_is_no_answer_is_an_error_of_the_row(start, engine, monkeypatch):
    """Whatever a stranger sends: types, bounds, other ids beside the log-probs."""
    server = start()
    made = engine(server)
    good = {}
    answer = server._answer
    monkeypatch.setattr(server, "_answer", lambda *a: good.setdefault("it", answer(*a)))
    made.collect(made.submit(prompts_of(made.policy)[:1], CONFIG, seed=1, generations=3))
    bad = [
        {"choices": None}, {"choices": [{}] * 3}, {"choices": 7}, {"prompt_token_ids": None},
        {"prompt_token_ids": ["a"]}, {"choices": [{**good["it"]["choices"][0], "token_ids": [1.5]}] * 3},
        {"choices": [{**good["it"]["choices"][0], "logprobs": None}] * 3},
        {"choices": [{**good["it"]["choices"][0], "token_ids": [10**30]}] * 3},
        {"prompt_token_ids": {}}, {"prompt_token_ids": ""}, {"choices": good["it"]["choices"][:1]},
        {"choices": good["it"]["choices"][:1] * 3}, {"choices": good["it"]["choices"] * 2},
        {"choices": [with_first_logp(good["it"]["choices"][0], 10**400), *good["it"]["choices"][1:]]},
        {"choices": [with_first_logp(good["it"]["choices"][0], 2.5), *good["it"]["choices"][1:]]},
    ]  # fmt: skip
    for change_ in bad:
        monkeypatch.setattr(server, "_answer", lambda *a, c=change_: {**good["it"], **c})
        with pytest.raises(EngineError):
            made.collect(made.submit(prompts_of(made.policy)[:1], CONFIG, seed=1, generations=3))


def with_first_logp(choice, logp):
    first, *rest = choice["logprobs"]["content"]
    return {**choice, "logprobs": {"content": [{**first, "logprob": logp}, *rest]}}


def test_one_completion_does_not_stand_for_all_that_were_drawn(start, engine, monkeypatch):
    """A greedy one does; else a server that answers with one would have it counted G times."""
    server = start()
    made = engine(server)
    answer = server._answer
    monkeypatch.setattr(server, "_answer", lambda *a: (it := answer(*a)) | {"choices": it["choices"][:1]})
    with pytest.raises(EngineError, match=r"row row\d.*1 rollouts, 3 were asked for"):
        made.collect(ask(made))
    prompts = prompts_of(made.policy)
    groups = made.collect(made.submit(prompts, CONFIG, seed=1, generations=3, greedy=True))
    assert all(len(group.rollouts) == 3 and len({*group.rollouts}) == 1 for group in groups)


def test_figures_that_a_server_keeps_to_itself_stop_nothing(start, engine, monkeypatch):
    server = start()
    made = engine(server)
    other = server._other

    def guarded(path, asked):
        if path == "/metrics":
            raise Refused(403, "not for you")
        return other(path, asked)

    monkeypatch.setattr(server, "_other", guarded)
    assert len(made.collect(ask(made))) == 4 and "prefix_hit_rate" not in made.metrics()


def test_hits_are_counted_of_each_server_since_the_last_collection(start, engine, monkeypatch):
    """Not of the runs before, and not of its whole life where a server begins at 0 or was away."""
    one, two = start(), start()
    counters = {one: [1000, 1000], two: [500, 0]}  # positions asked for, positions that were there
    for fake in counters:
        text = 'vllm:prefix_cache_{}_total{{engine="0"}} {}\n'

        def metrics(path, asked, fake=fake, other=fake._other, text=text):
            if path == "/metrics":
                return "".join(map(text.format, ("queries", "hits"), counters[fake])) + "vllm:x nan\nvllm: \n"
            return other(path, asked)

        monkeypatch.setattr(fake, "_other", metrics)
    made = engine(one, two)

    def hit_rate(*counts):
        counters.update(zip((one, two), counts, strict=True))
        made.collect(ask(made))
        return made.metrics()["prefix_hit_rate"]

    assert hit_rate([1100, 1050], [600, 50]) == pytest.approx(0.5)
    assert hit_rate([100, 25], [700, 125]) == pytest.approx(0.5)  # one was started anew
    made.servers.take_down(made.servers.all[0], 0, "away")
    made.servers.all[0].look_at = float("inf")
    assert hit_rate([100, 25], [800, 225]) == pytest.approx(1.0)
    made.servers.bring_up(made.servers.all[0])
    assert hit_rate([200, 25], [800, 225]) == pytest.approx(0.0)


def test_one_that_comes_back_with_another_key_stays_down_and_the_others_go_on(start, engine, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    one, two = start(key="sesame"), start(key="sesame")
    made = engine(one, two)
    one.die()
    expected = made.collect(ask(made))
    one.key = "changed"
    one.revive()
    wait(lambda: (made.servers.look(), "VLLM_API_KEY" in made.servers.all[0].problem)[1])
    assert made.collect(ask(made)) == expected and not made.servers.all[0].up


def test_a_damaged_cache_that_one_rank_has_seen_is_not_forgotten_at_a_sync(start, engine):
    """Rank 0 has seen nothing of it, and calls the server up."""
    one, two = start(), start()
    made = engine(one, two)
    one.faults = ["miss"]
    made.collect(ask(made))
    made.adopt(["", ""])
    assert [server.up for server in made.servers.all] == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason="vLLM is not importable; set COVO_RL_VLLM_PYTHON (docs/serving.md)")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", ["covo_audio", "qwen2_audio"])
def test_a_stock_server_runs_the_policy_and_faults_stop_the_run(family):
    script = Path(__file__).parent / "serving" / "server_check.py"
    done = subprocess.run(
        [sys.executable, str(script), family, "--vllm", str(vllm_python())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(": ok") == 6
