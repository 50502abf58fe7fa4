"""Rollouts one step ahead: the order of things, exact resumes, and an engine that fails, hangs or is gone."""

import random
import sys
from concurrent.futures import Future
from pathlib import Path

import policy_cases
import pytest
import torch
import train_cases as cases
from accelerate import Accelerator
from deaths import killed_at

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from fake_server import FakeServer, hurry

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, Options, option_problems
from covo_rl.engines.base import EngineLost, Failed, Pending, SyncReport
from covo_rl.engines.own import OwnEngine, sample
from covo_rl.engines.vllm_server import VLLMServer
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.records.folder import Run
from covo_rl.rewards import Scoring
from covo_rl.train.batch import Batch, hash_seed
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StoppedBySignal, StopSignals, TrainingStopped
from covo_rl.train.loop import Trainer
from covo_rl.train.pipeline import Pipeline


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.policy.named_parameters()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def rows_by_step(folder, seen):
    """A callback that notes which rows each step trained on, and logs the step."""
    record = Run(folder)

    def on_step(line, batch):
        record.log_metrics(line)
        seen[line["step"]] = [group.prompt.example.id for group in batch.groups]

    return on_step


# -- one step ahead ----------------------------------------------------------------------------------------------


def test_one_step_ahead_is_the_loop_that_anybody_would_write(tmp_path):
    settings = cases.options(tmp_path, rollout_ahead=1, num_iterations=2, max_steps=3)
    made = cases.trainer(settings)
    lines = []
    made.run(lambda metrics, batch: lines.append(metrics))
    assert [line["engine/lag"] for line in lines] == [0, 2, 2]  # updates; a step has two

    hand = cases.trainer(cases.options(tmp_path, num_iterations=2, max_steps=3, sampler_correction=True))
    seed, totals = settings.train.seed, []

    def sampled(step):
        prompts = [hand.prompt_of(row.id) for row in hand.sampler.take(4)]
        with torch.no_grad():
            features = hand.policy.features(prompts)
        return sample(hand.policy, prompts, features, settings.rollout, seed=hash_seed(seed, step, 0),
                      version=hand.learner.applied)  # fmt: skip

    following = sampled(0)
    for hand.step in range(3):
        groups = following
        following = sampled(hand.step + 1) if hand.step < 2 else []
        table = Scoring(groups, settings.reward, trainer_state={"step": hand.step}, rewards=hand.terms).table()
        old_logps = hand.learner.old_logps(groups, exact=True)  # scored anew, where they are of an older version
        batch = Batch(groups, table, hand.advantages_of(groups, table), old_logps, None, hand.learner.applied)
        hand.update_index = 0
        hand.update(batch)
        totals.append(float(table.rewards_PG.mean()))
    assert same(weights(hand), weights(made))
    assert [line["reward_total"] for line in lines] == pytest.approx(totals, abs=1e-12)
    on_policy = cases.trainer(cases.options(tmp_path, num_iterations=2, max_steps=3))
    on_policy.run()
    assert not same(weights(on_policy), weights(made)), "a lag without effect would prove nothing"


class Recorder:
    """An engine of its own memory, as far as the loop can see: the policy, asked at once, answered by a future.

    `lose` and `fail` name calls of `collect` (from 0) that find nobody, and rows whose groups do not come.
    """

    name, exact = "recorder", False

    def __init__(self, policy, *, lose=(), fail=(), slow=False):
        self.own, self.calls, self.failed = OwnEngine(policy, ahead=True), [], ()
        self.lose, self.fail, self.slow, self.collections = lose, fail, slow, 0

    def sync(self, version):
        self.calls.append(f"sync {version}")
        self.own.sync(version)
        return SyncReport(version, {"save": 1.0, "load": 2.0}, 0.125, 1 / 512)

    def submit(self, prompts, config, **options):
        self.calls.append(f"submit {self.own.version}")
        pending, future = self.own.submit(prompts, config, **options), Future()
        if not self.slow:
            future.set_result(pending)
        return Pending(pending.prompts, pending.generations, pending.version, future)

    def collect(self, pending):
        self.calls.append(f"collect {pending.version}")
        self.collections += 1
        if self.collections - 1 in self.lose:
            raise EngineLost("nobody answers")
        groups = self.own.collect(pending.work.result(0))
        self.failed = [Failed(row, "it \x1b[31m hangs") for row in self.fail if any(
            group.prompt.example.id == row for group in groups)]  # fmt: skip
        return [group for group in groups if group.prompt.example.id not in self.fail]

    def rest(self):
        self.calls.append("rest")

    def close(self):
        pass

    def metrics(self):
        return {"sample_s": 0.5, "prefix_hit_rate": 0.75}


def recorded(tmp_path, changes=None, **faults):
    settings = cases.options(tmp_path, **(changes or {}))
    torch.manual_seed(settings.train.seed)
    policy = policy_cases.policy()
    engine = Recorder(policy, **faults)
    return Trainer(settings, policy, policy.clips, cases.rows(), Accelerator(cpu=True), engine), engine


def test_the_next_step_is_asked_for_before_this_one_is_scored(tmp_path):
    made, engine = recorded(tmp_path, {"rollout_ahead": 1, "max_steps": 3})
    lines = []
    made.run(lambda metrics, batch: lines.append(metrics))
    assert engine.calls == [
        "rest", "sync 0", "submit 0", "collect 0", "submit 0", "rest",  # the first update follows: version 1
        "collect 0", "sync 1", "submit 1", "rest",
        "collect 1", "rest",  # nothing comes after the last step
    ]  # fmt: skip
    assert [line["engine/lag"] for line in lines] == [0, 1, 1]
    assert lines[1]["engine/probe_abs"] == 0.125 and lines[1]["seconds"]["sync_save"] == 1.0
    assert lines[1]["engine/lora_rounding"] == 1 / 512
    assert lines[1]["engine/prefix_hit_rate"] == 0.75 and lines[1]["engine/failed_groups"] == 0
    assert lines[1]["engine/tokens"] == lines[1]["completion_length"] * 12 and lines[1]["engine/tokens_per_s"] > 0
    assert all(line["time/idle_trainer"] >= 0 and line["time/idle_engine"] >= 0 for line in lines)


def test_without_a_step_ahead_every_rollout_is_of_the_newest_policy(tmp_path):
    made, engine = recorded(tmp_path, {"max_steps": 2})
    made.run()
    made.sync()  # as an evaluation does, after the last update
    made.sync()
    assert engine.calls == ["rest", "sync 0", "submit 0", "collect 0", "rest", "sync 1", "submit 1", "collect 1",
                            "rest", "sync 2"]  # fmt: skip
    assert same(weights(made), weights(cases.run(cases.options(tmp_path, max_steps=2, sampler_correction=False))[0]))


# -- groups and engines that do not come -------------------------------------------------------------------------


def test_groups_that_fail_are_counted_and_too_many_stop_the_run(tmp_path):
    made, _ = recorded(tmp_path, {"failed_groups_limit": 0.25, "max_steps": 2}, fail=["row2"])
    lines, rows = [], []
    made.run(lambda metrics, batch: (lines.append(metrics), rows.extend(g.prompt.example.id for g in batch.groups)))
    counts = [line["engine/failed_groups"] for line in lines]
    assert sum(counts) + len(rows) == 8 and sum(counts) >= 1 and "row2" not in rows
    made, _ = recorded(tmp_path, {"max_steps": 2}, fail=["row2"])
    with pytest.raises(TrainingStopped, match=r"1 of 4 groups could not be sampled, above failed_groups_limit 0\.05\. "
                                              r"The first: row row2: it \\x1b\[31m hangs"):  # fmt: skip
        made.run()
    made, _ = recorded(tmp_path, {"failed_groups_limit": 1.0}, fail=[f"row{i}" for i in range(6)])
    with pytest.raises(TrainingStopped, match="step 0: 4 of 4 groups"):
        made.run()


def test_other_rows_take_the_places_of_groups_that_fail_again(tmp_path):
    changes = {"dynamic_sampling": 2, "failed_groups_limit": 0.5, "rewards": {policy_constant: 1.0}, "max_steps": 1}
    made, engine = recorded(tmp_path, changes, fail=["row3"])
    metrics, batch = made.train_step()
    assert metrics["engine/failed_groups"] >= 1 and engine.collections == 3
    assert len(batch.groups) <= 4 and "row3" not in [group.prompt.example.id for group in batch.groups]


def test_the_limit_of_failed_groups_is_of_the_step_and_not_of_the_few_that_are_sampled_again(tmp_path):
    changes = {"dynamic_sampling": 1, "failed_groups_limit": 0.25, "rewards": {constant_but_once: 1.0}, "max_steps": 1}
    made, engine = recorded(tmp_path, changes, fail=["row0", "row1", "row2", "row3", "row4", "row5"])
    original, first = made.pipeline.submit, {}

    def submit(order, version, clock):
        original(order, version, clock)
        first.setdefault("rows", [row.id for row in order.share])
        engine.fail = [row.id for row in order.share if order.attempt]  # all that are sampled again

    made.pipeline.submit = submit
    metrics, batch = made.train_step()
    assert metrics["engine/failed_groups"] == 1, "one of one that was asked for again is one of four of the step"
    assert [group.prompt.example.id for group in batch.groups] == first["rows"]


def constant_but_once(completions, **columns):
    """All groups but the first have something to learn from."""
    return [float(i % 3 if i >= 3 else 0) for i in range(len(completions))]


constant_but_once.isolation = "thread"


def policy_constant(completions, **columns):
    return [1.0] * len(completions)


policy_constant.isolation = "thread"


@pytest.mark.parametrize(("ahead", "lost"), [(0, 2), (1, 2), (1, 0)])
def test_a_lost_engine_ends_in_a_checkpoint_from_which_no_row_is_lost_or_doubled(tmp_path, ahead, lost):
    """Without a step ahead the very same run goes on; with one, rollouts that were lost come from a newer policy."""
    undisturbed, expected = cases.trainer(cases.options(tmp_path / "a", rollout_ahead=ahead)), {}
    undisturbed.run(rows_by_step(tmp_path / "a", expected))
    made, _ = recorded(tmp_path / "b", {"rollout_ahead": ahead}, lose=[lost])
    seen = {}
    saver = Saver(made.options, tmp_path / "b")
    with pytest.raises(StoppedBySignal) as stopped:
        made.run(rows_by_step(tmp_path / "b", seen), saver)
    assert stopped.value.code == 75
    assert f"the loss of the engine (nobody answers) after saving {tmp_path}" in stopped.value.message
    made, _ = recorded(tmp_path / "b", {"rollout_ahead": ahead, "resume": "auto"})
    saver = Saver(made.options, tmp_path / "b")
    saver.resume(made, "auto")
    made.run(rows_by_step(tmp_path / "b", seen), saver)
    assert seen == expected and len(cases.metrics(tmp_path / "b")) == 4
    if not ahead:
        assert [x["reward_total"] for x in cases.metrics(tmp_path / "b")] == [
            x["reward_total"] for x in cases.metrics(tmp_path / "a")
        ]
    assert undisturbed.step == made.step == 4


def test_a_signal_does_not_wait_for_an_engine_that_hangs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("covo_rl.train.checkpoint.saver.SIGNAL_PATIENCE", 0.05)
    monkeypatch.setattr("covo_rl.train.pipeline.SIGNAL_PATIENCE", 0.05)
    made, engine = recorded(tmp_path, {"rollout_ahead": 1})
    original = made.pipeline.submit

    def submit(order, version, clock):
        engine.slow = order.step == 2
        original(order, version, clock)

    monkeypatch.setattr(made.pipeline, "submit", submit)
    stop, seen = StopSignals(), {}
    note = rows_by_step(tmp_path, seen)

    def on_step(line, batch):
        note(line, batch)
        stop.received = "SIGTERM" if line["step"] == 2 else None

    with pytest.raises(StoppedBySignal):
        made.run(on_step, Saver(made.options, tmp_path, stop))
    assert "step 2: the checkpoint holds its rows without rollouts: not there within 0.05 s" in capsys.readouterr().err
    made, _ = recorded(tmp_path, {"rollout_ahead": 1})
    saver = Saver(made.options, tmp_path)
    saver.resume(made, "auto")
    assert [order.step for order in made.pipeline.orders] == [2] and made.pipeline.orders[0].groups is None
    made.run(rows_by_step(tmp_path, seen), saver)
    expected = cases.trainer(cases.options(tmp_path)).sampler
    assert list(seen.values()) == [[row.id for row in expected.take(4)] for _ in range(4)]


def test_a_signal_ends_the_wait_for_the_rollouts_of_this_very_step(tmp_path, monkeypatch):
    monkeypatch.setattr("covo_rl.train.pipeline.SIGNAL_PATIENCE", 0.05)
    made, engine = recorded(tmp_path, slow=True)
    stop = StopSignals()
    stop.received = "SIGTERM"  # while nobody has answered yet
    with pytest.raises(StoppedBySignal, match="75") as stopped:
        made.run(None, Saver(made.options, tmp_path, stop))
    assert "SIGTERM came before the rollouts" in stopped.value.message
    assert engine.calls[-1] == "submit 0" and len(made.pipeline.state_dict()[0]["rows"]) == 4


# -- exact resumes with a server ---------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(a trainer whose rollouts a FakeServer samples, its saver), made anew at every call; and the server."""
    hurry(monkeypatch)
    with FakeServer(policy_cases.policy()) as server:
        engines = []

        def make(folder, **changes):
            settings = cases.options(
                folder, use_vllm=True, vllm_mode="server", vllm_server_base_url=server.url, engine_patience=0.3,
                checkpoint_every=1, max_steps=3, **changes,
            )  # fmt: skip
            torch.manual_seed(settings.train.seed)
            modes = make_trainable(policy_cases.family(), AdapterConfig(lora_r=4, lora_alpha=8.0))
            policy = Policy(modes.family, modes.peft_model, clips=ClipStore())
            engines.append(VLLMServer(policy, modes, settings, max_model_len=200,
                                      probe_prompt=policy_cases.prompts(policy)[0]))  # fmt: skip
            made = Trainer(settings, policy, policy.clips, cases.rows(), Accelerator(cpu=True), engines[-1])
            return made, Saver(settings, folder)

        yield make, server
        for engine in engines:
            engine.close()


#: figures of a process, not of what it trained
OF_THE_PROCESS = ("time/", "engine/tokens_per_s", "engine/retries", "engine/probe_abs", "engine/clips_prepared")


def outcome(folder):
    return [{name: value for name, value in line.items() if not name.startswith(OF_THE_PROCESS)}
            for line in cases.metrics(folder)]  # fmt: skip


def kill_and_resume(make, folder, monkeypatch, kills, seed, **changes):
    """Kills at random calls of all that matters, until there were enough; how often it was resumed, and the weights."""
    places = [(Pipeline, name) for name in ("sync", "submit", "collect", "settle", "_figures")]
    places += [(Trainer, name) for name in ("generate", "update", "metrics")] + [(Run, "log_metrics")]
    places += [(Saver, "_save"), (VLLMServer, "sync"), (VLLMServer, "submit"), (VLLMServer, "collect")]
    numbers, done, made = random.Random(seed), 0, None
    while True:
        made, saver = make(folder, resume="auto", **changes)
        saver.resume(made, "auto")
        after = numbers.random() < 0.5
        number = numbers.randint(1, 45) if done < kills else 10**9
        died, _ = killed_at(number, monkeypatch, places, lambda made=made, saver=saver: made.run(
            lambda metrics, batch: Run(folder).log_metrics(metrics), saver), after=after)  # fmt: skip
        if not died:
            if done >= kills:
                return made
            for file in sorted(folder.rglob("*"), reverse=True):  # it came to its end before it was killed: once more
                file.rmdir() if file.is_dir() else file.unlink()
        done += died


@pytest.mark.parametrize(
    ("kills", "changes"),
    [
        (2, {"rollout_ahead": 1}),
        pytest.param(20, {"rollout_ahead": 1, "num_iterations": 2}, marks=pytest.mark.slow),
        pytest.param(20, {"rollout_ahead": 0}, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_a_server_that_is_killed_anywhere_ends_in_the_same_bits(tmp_path, monkeypatch, served, kills, changes):
    make, _ = served
    undisturbed, saver = make(tmp_path / "a", **changes)
    saver.resume(undisturbed, None)
    undisturbed.run(lambda metrics, batch: Run(tmp_path / "a").log_metrics(metrics), saver)
    resumed = kill_and_resume(make, tmp_path / "b", monkeypatch, kills, 0, **changes)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a") and len(outcome(tmp_path / "a")) == 3
    assert same(weights(resumed), weights(undisturbed))


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_changes_no_step(tmp_path, served):
    make, server = served
    undisturbed, saver = make(tmp_path / "a")
    undisturbed.run(lambda metrics, batch: Run(tmp_path / "a").log_metrics(metrics), saver)
    made, saver = make(tmp_path / "b")
    log = Run(tmp_path / "b").log_metrics
    with pytest.raises(StoppedBySignal, match="75"):
        made.run(lambda metrics, batch: (log(metrics), server.die() if metrics["step"] == 2 else None)[0], saver)
    server.revive()
    made, saver = make(tmp_path / "b", resume="auto")
    saver.resume(made, "auto")
    made.run(lambda metrics, batch: Run(tmp_path / "b").log_metrics(metrics), saver)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_vllm": True, "rollout_ahead": 1}, "rollout_ahead 1 needs vllm_mode server"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode server needs vllm_server_base_url"),
        ({"use_vllm": True, "vllm_server_base_url": "http://a:1"}, "no effect without vllm_mode server"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://a/,http://a"}, "stands there twice"),
        ({"vllm_options": "max_model_len=8"}, "covo_rl sets max_model_len itself, from vllm_max_model_length"),
        ({"vllm_options": "block_size"}, "cannot read 'block_size'"),
        ({"rollout_ahead": 2}, "rollout_ahead 2: must be in [0, 1]"),
        ({"use_vllm": True, "vllm_adapter_transport": "http"}, "vllm_adapter_transport http is for vllm_mode server"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_told_at_once(changes, words):
    options = Options()
    for name, value in changes.items():
        setattr(options.engine, name, value)
    assert [problem for problem in option_problems(options) if words in problem]
