"""The real trainer on a tiny Covo-Audio: stopped and resumed anywhere, and every fault with its promised behaviour."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases as cases

from covo_rl.audio import AudioError
from covo_rl.engines import own
from covo_rl.train import learner as learner_module
from covo_rl.train import rows as train_module
from covo_rl.train.batch import loss_mask, sampling_logps
from covo_rl.train.guard import StoppedBySignal, StopSignals, TrainingStopped

LORA = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 3}
VARIANTS = {
    "lora, 2 iterations, 2 parts": LORA,
    "full, kl": {"lora": False, "train_parts": ["llm", "lm_head"], "beta": 0.05, "num_iterations": 2},
    "encoder trains": {"lora": False, "train_parts": ["encoder", "audio_adapter", "llm"], "max_steps": 3},
    "dynamic sampling, cosine": {
        "dynamic_sampling": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_steps": 3,
    },
    "a step ahead": {"rollout_ahead": 1, "num_iterations": 2, "dynamic_sampling": 1, "max_steps": 3},
}


class StopAtEveryUpdate(StopSignals):
    """A signal has always just arrived."""

    def __init__(self):
        self.received = "SIGTERM"


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_after_every_update_the_metrics_are_the_same_bits(tmp_path, variant):
    options = VARIANTS[variant]
    undisturbed, _ = cases.run(cases.options(tmp_path / "a", **options))
    moments, resumed = 0, None
    while resumed is None:
        try:
            resumed, _ = cases.run(cases.options(tmp_path / "b", resume="auto", **options), stop=StopAtEveryUpdate())
        except StoppedBySignal:
            moments += 1
            assert moments < 40, "the run does not get on"
    assert moments == undisturbed.options.train.max_steps * undisturbed.learner.updates_per_step
    assert cases.metrics(tmp_path / "b") == cases.metrics(tmp_path / "a")
    ours, theirs = dict(resumed.policy.named_parameters()), dict(undisturbed.policy.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rewards = [line["reward_total"] for line in cases.metrics(tmp_path / "a")]
    assert len(set(rewards)) > 1, "a run without change would prove nothing"


def poison(monkeypatch, updates, value=math.nan):
    """Make the loss of the given updates (counted from 0) not finite."""
    original, seen = learner_module.Learner.update, []

    def update(self, batch, chosen, step):
        seen.append(step)
        with monkeypatch.context() as inner:
            if len(seen) - 1 in updates:
                loss = learner_module.policy_loss
                inner.setattr(learner_module, "policy_loss", lambda *a, **k: _poisoned(loss(*a, **k), value))
            return original(self, batch, chosen, step)

    monkeypatch.setattr(learner_module.Learner, "update", update)


def _poisoned(result, value):
    loss, metrics = result
    return loss * value, {**metrics, "loss.sum": torch.tensor(value)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_counted_and_dumped(tmp_path, monkeypatch, value):
    poison(monkeypatch, {1}, value)
    made, _ = cases.run(cases.options(tmp_path))
    assert made.guard.skipped == 1 and made.learner.applied == 3
    assert [line["skipped_steps"] for line in cases.metrics(tmp_path)] == [0, 1, 1, 1]
    assert all(torch.isfinite(p).all() for p in made.policy.parameters())
    dump = json.loads((tmp_path / "debug" / "step_000001" / "rank_00000.json").read_text())
    assert dump["not_finite"]["loss"] == str(value)
    assert {row["id"] for row in dump["rows"]} <= {f"row{i}" for i in range(6)} and len(dump["rows"]) == 4
    assert dump["not_finite_in"]["gradients"] and not dump["not_finite_in"]["parameters"]


def test_a_skipped_update_leaves_weights_and_moments_alone(tmp_path, monkeypatch):
    poison(monkeypatch, {0, 1})
    made = cases.trainer(cases.options(tmp_path, max_steps=2))
    before = {name: p.clone() for name, p in made.policy.named_parameters()}
    made.run()
    assert all(torch.equal(before[name], p) for name, p in made.policy.named_parameters())
    assert not made.optimizer.optimizer.state


def test_three_in_a_row_stop_the_run_with_advice(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 3})
    with pytest.raises(TrainingStopped, match=r"step 3: 3 optimiser updates in a row(?s:.)*learning_rate"):
        cases.run(cases.options(tmp_path, max_steps=9, checkpoint_every=1))
    poison(monkeypatch, {0, 1, 3, 4})  # never three in a row
    assert cases.run(cases.options(tmp_path / "b", max_steps=6))[0].guard.skipped == 4


def test_a_nan_in_the_model_is_caught_the_same_way(tmp_path):
    made = cases.trainer(cases.options(tmp_path))
    name, parameter = next((n, p) for n, p in made.policy.named_parameters() if p.requires_grad)
    made.train_step()
    with torch.no_grad():
        parameter.fill_(math.nan)
    with pytest.raises(TrainingStopped, match="step 3: 3 optimiser updates in a row were not finite"):
        made.run()
    dump = json.loads((tmp_path / "debug" / "step_000001" / "rank_00000.json").read_text())
    assert name in dump["not_finite_in"]["parameters"]


def fails_at(*steps):
    """A component that is down at these steps, and that tries to write the trainer's own figures."""

    def outage(completions, trainer_state, log_metric, **columns):
        log_metric("step", 77)
        log_metric("reward_total", 77)
        if trainer_state.step in steps:
            raise ConnectionError("the judge is away")
        return [None, *([0.5] * (len(completions) - 1))]

    return outage


def test_one_outage_does_not_stop_a_run_and_a_broken_component_does(tmp_path):
    """findings 14, 16 and 19: a failure is judged by component, over steps; nobody is outranked for it."""
    made, _ = cases.run(cases.options(tmp_path / "a", rewards={cases.vowels: 1.0, fails_at(1): 1.0}))
    lines = cases.metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and made.step == 4
    assert [line["none_outage"] for line in lines] == pytest.approx([1 / 12, 1.0, 1 / 12, 1 / 12])
    assert [line["none_total"] for line in lines] == pytest.approx(
        [1 / 12, 0.0, 1 / 12, 1 / 12]
    )  # nobody has it: it leaves the sum
    assert lines[0]["logged/step"] == lines[0]["logged/reward_total"] == 77 and lines[0]["reward_total"] < 3
    with pytest.raises(TrainingStopped, match=r"step 2: reward outage: 12 of 12 scores failed(?s:.)*judge is away"):
        cases.run(cases.options(tmp_path / "b", rewards={cases.vowels: 1.0, fails_at(*range(9)): 1.0}, max_steps=20))


def out_of_memory_above(monkeypatch, limit):
    """As if more than `limit` rollouts (three per group) did not fit; lists the sizes that were tried."""
    original, tried = learner_module.Learner._scored, []

    def scored(self, groups):
        tried.append(sum(len(group.rollouts) for group in groups))
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return original(self, groups)

    monkeypatch.setattr(learner_module.Learner, "_scored", scored)
    return tried


def test_out_of_memory_says_what_to_change(tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, 6)
    with pytest.raises(
        TrainingStopped, match=r"micro_batch_prompts \(now 4\) to 2: same gradient.*--oom_retry"
    ) as stop:
        cases.run(cases.options(tmp_path, micro_batch_prompts=4))
    assert isinstance(stop.value.__cause__, torch.OutOfMemoryError)


def test_out_of_memory_is_retried_with_half_the_micro_batch_down_to_one_rollout(tmp_path, monkeypatch):
    expected, _ = cases.run(cases.options(tmp_path / "a", micro_batch_prompts=1))
    tried = out_of_memory_above(monkeypatch, 1)
    made, _ = cases.run(cases.options(tmp_path / "b", micro_batch_prompts=4, oom_retry=True))
    assert tried[:6] == [12, 6, 3, 1, 1, 1]
    assert (made.learner.size.prompts, made.learner.size.rollouts) == (1, 1)
    for ours, theirs in zip(cases.metrics(tmp_path / "b"), cases.metrics(tmp_path / "a"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True)
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(TrainingStopped, match="max_completion_length: a micro-batch is one rollout already"):
        cases.run(cases.options(tmp_path / "c", oom_retry=True))
    assert expected.learner.applied == made.learner.applied == 4


def test_out_of_memory_while_sampling_says_what_makes_it_smaller(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(own, "sample", full)
    expected = r"sampling 4 prompts x 3 rollouts of up to 8 tokens, 256 at a time\. Lower decode_rows.*prompts_per"
    with pytest.raises(TrainingStopped, match=expected) as stop:
        cases.run(cases.options(tmp_path, oom_retry=True))
    assert isinstance(stop.value.__cause__, torch.OutOfMemoryError)


def test_other_runtime_errors_are_not_taken_for_out_of_memory(tmp_path, monkeypatch):
    def broken(self, groups):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(learner_module.Learner, "_scored", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cases.run(cases.options(tmp_path, oom_retry=True))


def unreadable(monkeypatch, names):
    original = train_module.build_prompt

    def build(row, *args):
        if row.id in names:
            raise AudioError(f"{row.id}: cannot decode")
        return original(row, *args)

    monkeypatch.setattr(train_module, "build_prompt", build)


def test_a_clip_that_fails_in_the_middle_is_skipped_and_counted(tmp_path, monkeypatch):
    unreadable(monkeypatch, {"row3"})
    made, _ = cases.run(cases.options(tmp_path, skipped_rows_limit=0.2))
    assert made.rows.skipped == {"row3": "row3: cannot decode"}
    assert cases.metrics(tmp_path)[-1]["skipped_rows"] == 1
    assert made.step == 4


def test_too_many_unreadable_clips_stop_the_run(tmp_path, monkeypatch):
    unreadable(monkeypatch, {"row3", "row4"})
    with pytest.raises(TrainingStopped, match=r"2 of 6 rows were skipped(?s:.)*row row\d: row\d: cannot decode"):
        cases.run(cases.options(tmp_path, skipped_rows_limit=0.2))


def test_the_overlong_penalty_reaches_the_advantages(tmp_path):
    made = cases.trainer(cases.options(tmp_path, overlong_buffer=4))
    _, batch = made.train_step()
    cut = [[r.stop_reason == "length" for r in group.rollouts] for group in batch.groups]
    penalty_PG = batch.advantages.rewards_PG - batch.table.rewards_PG
    assert torch.tensor(cut).any()
    assert (penalty_PG[torch.tensor(cut).numpy()] == -1).all()


def test_completions_cut_by_length_leave_the_loss_if_asked_for(tmp_path):
    """Limit 8: most random completions are cut. Their tokens then carry no loss, the others' normaliser stays right."""
    made = cases.trainer(cases.options(tmp_path, mask_truncated_completions=True))
    batch = made.generate()
    mask_NC = torch.ones(12, 8, dtype=torch.bool)
    complete = [r.stop_reason == "stop" for group in batch.groups for r in group.rollouts]
    assert not all(complete)
    kept = loss_mask(batch.groups, mask_NC, made.options.loss)
    assert kept.any(1).tolist() == complete
    assert torch.equal(loss_mask(batch.groups, mask_NC, cases.options(tmp_path).loss), mask_NC)
    made.update(batch)
    assert made.learner.applied == 1


def test_the_micro_batch_size_changes_nothing_but_memory(tmp_path):
    for size in (1, 3, 4):
        cases.run(cases.options(tmp_path / str(size), micro_batch_prompts=size, **LORA))
    for size in (1, 2):  # of three rollouts
        split = {"micro_batch_prompts": 1, "micro_batch_rollouts": size, "beta": 0.1}
        cases.run(cases.options(tmp_path / f"split{size}", **{**LORA, **split}))
    cases.run(cases.options(tmp_path / "whole", **LORA, beta=0.1))
    runs = {path.name: cases.metrics(path) for path in tmp_path.iterdir()}
    pairs = [("3", "1"), ("4", "1"), ("split1", "whole"), ("split2", "whole")]
    for other, one in ((runs[a], runs[b]) for a, b in pairs):
        assert [line["reward_total"] for line in other] == [line["reward_total"] for line in one]
        for ours, theirs in zip(other, one, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_old_log_probs_of_an_inexact_sampler_reuse_the_prompts(tmp_path, monkeypatch):
    """bf16 samples and scores with other roundings, so the old policy gets a pass: completions only, prompts kept."""
    monkeypatch.setattr(own, "samples_exactly", lambda policy: False)
    made = cases.trainer(cases.options(tmp_path, **LORA))
    batch = made.generate()
    prompts = {group.prompt.input_ids: len(group.prompt.input_ids) for group in batch.groups}
    assert made.policy.counters.prompt_positions == sum(prompts.values())
    assert batch.old_logps is not None and made.policy.counters.passes > 1
    for old, group in zip(batch.old_logps, batch.groups, strict=True):
        torch.testing.assert_close(old, sampling_logps(group, "cpu"), atol=1e-5, rtol=0)
    assert made.policy.prompt_cache is None


def test_top_entropy_tokens_are_chosen_over_all_micro_batches(tmp_path):
    words = {"top_entropy_quantile": 0.5, "max_steps": 2}
    for size in (1, 4):
        cases.run(cases.options(tmp_path / str(size), micro_batch_prompts=size, **words))
    for ours, theirs in zip(cases.metrics(tmp_path / "1"), cases.metrics(tmp_path / "4"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cases.run(cases.options(tmp_path / name, seed=seed, max_steps=2))
    first, again, other = (cases.metrics(tmp_path / name) for name in "abc")
    assert first == again and first != other
