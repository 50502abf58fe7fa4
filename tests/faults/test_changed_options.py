"""A change between a checkpoint and its resume is in force, or refused; none is announced and then ignored."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases as cases

from covo_rl.config import ConfigError
from covo_rl.train.checkpoint import state
from covo_rl.train.checkpoint.identity import (
    BEGINNING,
    FREE,
    UPDATE,
    base_fingerprint,
    check_changes,
)
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.ranks import Ranks
from covo_rl.train.schedule import place_schedule, schedule_of

FULL = {"lora": False, "train_parts": ["audio_adapter", "llm"], "part_learning_rates": "audio_adapter=1e-3,llm=1e-2",
        "weight_decay": 0.1, "warmup_steps": 2}  # fmt: skip
#: the new value, and the rates of audio_adapter and llm after 2 of 4 updates, by hand
CHANGES = {
    "nothing": ({}, (1e-3 * 3 / 3, 1e-2 * 3 / 3)),
    "part rates": ({"part_learning_rates": "audio_adapter=5e-3,llm=2e-3"}, (5e-3, 2e-3)),
    "one part's rate": ({"part_learning_rates": "audio_adapter=5e-3", "learning_rate": 4e-3}, (5e-3, 4e-3)),
    "rate": ({"part_learning_rates": None, "learning_rate": 3e-3}, (3e-3, 3e-3)),
    "schedule": ({"lr_scheduler_type": "constant", "warmup_steps": 0}, (1e-3, 1e-2)),
    "warm-up": ({"warmup_steps": 0}, (1e-3 / 2, 1e-2 / 2)),  # linear: 2 of 4 updates are left
    "longer": ({"max_steps": 8, "warmup_steps": 4}, (1e-3 * 3 / 5, 1e-2 * 3 / 5)),  # warm-up 3 of 5
    "more updates a step": ({"num_iterations": 2}, (1e-3 * 4 / 6, 1e-2 * 4 / 6)),  # 4 of 8 done, 2 of them warm-up
    "weight decay": ({"weight_decay": 0.3}, (1e-3, 1e-2)),
    "betas": ({"adam_beta1": 0.5, "adam_beta2": 0.9}, (1e-3, 1e-2)),
}


class StopAtOnce(StopSignals):
    def __init__(self):
        self.received = "SIGTERM"


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """Checkpoints after two of four updates."""
    folder = tmp_path_factory.mktemp("halfway")
    made = cases.trainer(cases.options(folder, **FULL))
    made.options.train.max_steps = 2
    saver = Saver(cases.options(folder, **FULL), folder)
    made.run(None, saver)
    return folder / "checkpoints" / "step_000002"


def resumed(checkpoint, folder, **changes):
    """A trainer taken up at the checkpoint, and what was noted."""
    options = cases.options(folder, **{**FULL, **changes})
    made = cases.trainer(options)
    return made, Saver(options, folder).resume(made, str(checkpoint), allow_changed=True)


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters() if p.requires_grad}


def updated(trainer):
    trainer.train_step()
    return parameters(trainer)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_is_in_force_from_the_first_update_on(halfway, tmp_path, change):
    """finding 04: rates by hand; the next update is not the unchanged run's."""
    changes, (adapter_rate, llm_rate) = CHANGES[change]
    made, notes = resumed(halfway, tmp_path, **changes)
    assert {line.split(":")[1].strip() for line in notes if line.startswith("changed: ")} == set(changes)
    train = made.options.train
    for group in made.optimizer.param_groups:
        assert group["betas"] == (train.adam_beta1, train.adam_beta2)
        assert group["weight_decay"] == (0.0 if "no decay" in group["name"] else train.weight_decay)
        rate = adapter_rate if group["name"].startswith("audio_adapter") else llm_rate
        assert group["lr"] == pytest.approx(rate, rel=1e-6)
    assert made.schedule.get_last_lr() == [group["lr"] for group in made.optimizer.param_groups]
    unchanged, _ = resumed(halfway, tmp_path / "unchanged")
    before = {name: p.clone() for name, p in unchanged.policy.named_parameters() if p.requires_grad}
    ours, theirs = updated(made), updated(unchanged)
    assert any(not torch.equal(before[name], theirs[name]) for name in before)
    same = all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert same == (change in ("nothing", "schedule"))  # at the end of the warm-up, a constant rate is the same one


def test_the_moments_are_the_checkpoints_own(halfway, tmp_path):
    """finding 04: what is state comes back, whatever the options say."""
    plain, _ = resumed(halfway, tmp_path / "a")
    changed, _ = resumed(halfway, tmp_path / "b", adam_beta1=0.5, learning_rate=1.0, weight_decay=0.0)
    ours, theirs = (state.optimizer_state(made.optimizer, made.policy)[0] for made in (plain, changed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(bool(moment.any()) for name, moment in ours.items() if name.endswith("exp_avg"))


def test_every_schedule_is_placed_where_it_would_be(halfway):
    """finding 04: after n updates the rates are those of a schedule that made n steps."""
    for name in ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
                 "cosine_with_restarts"):  # fmt: skip
        for warmup in (0, 3):
            optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5) for _ in range(2)]
            walked, placed = (schedule_of(name, o, warmup_steps=warmup, steps=9) for o in optimizers)
            for updates in range(9):
                place_schedule(placed, updates)
                assert walked.get_last_lr() == placed.get_last_lr() == [optimizers[1].param_groups[0]["lr"]]
                optimizers[0].step()
                walked.step()
    for name in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(ConfigError, match="measure of progress; choose linear"):
            schedule_of(name, optimizers[0], warmup_steps=0, steps=9)


REFUSED = {
    "seed": ({"seed": 7}, "seed: 42 in the checkpoint, 7 now: the order of the rows"),
    "lora": ({"lora": True, "part_learning_rates": None}, "the trained parameters differ"),
    "parts": ({"train_parts": ["llm"], "part_learning_rates": None}, "the trained parameters differ"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_come_into_force_is_refused_although_allowed(halfway, tmp_path, change):
    """finding 04"""
    changes, message = REFUSED[change]
    with pytest.raises((ConfigError, RuntimeError), match=message):
        resumed(halfway, tmp_path, **changes)


def test_another_number_of_rows_is_refused_although_allowed(halfway, tmp_path):
    """finding 04: it was announced, and ended in the sampler's traceback."""
    options = cases.options(tmp_path, **FULL)
    made = cases.trainer(options, cases.rows(5))
    with pytest.raises(ConfigError, match="training data: 6 rows in the checkpoint, 5 now: the position in an epoch"):
        Saver(options, tmp_path).resume(made, str(halfway), allow_changed=True)


def test_an_adapter_to_start_from_cannot_change(tmp_path):
    """finding 04: the checkpoint's weights would be put over it without a word."""
    line = "adapter: None in the checkpoint, 'other' now"
    with pytest.raises(ConfigError, match="its weights were the start"):
        check_changes([line], allowed=True, mid_batch=False)
    assert len(BEGINNING) == 3


@pytest.fixture(scope="module")
def mid_batch(tmp_path_factory):
    """After the first of two updates of a batch."""
    folder = tmp_path_factory.mktemp("mid_batch")
    with pytest.raises(StoppedBySignal):
        cases.run(cases.options(folder, **{**FULL, "num_iterations": 2}), stop=StopAtOnce())
    return folder / "checkpoints" / "step_000000.001"


@pytest.mark.parametrize(
    "changes",
    [{"num_generations": 2}, {"temperature": 0.5}, {"beta": 0.1}, {"steps_per_generation": 2},
     {"scale_rewards": "none"}, {"prompts_per_step": 2}],
)  # fmt: skip
def test_in_the_middle_of_a_batch_only_the_update_can_change(mid_batch, tmp_path, changes):
    """finding 04: what the batch was sampled and scored with would be in force too late, or break it."""
    with pytest.raises(ConfigError, match=r"(?s)in the checkpoint.*in the middle of a generated batch.*without a dot"):
        resumed(mid_batch, tmp_path, num_iterations=2, **changes)


def test_in_the_middle_of_a_batch_a_changed_rate_is_in_force(mid_batch, tmp_path):
    """finding 04: and metrics are means over the updates that were made, however many there are now."""
    made, _ = resumed(mid_batch, tmp_path, num_iterations=3, part_learning_rates=None, learning_rate=3e-3,
                      warmup_steps=0)  # fmt: skip
    assert [group["lr"] for group in made.optimizer.param_groups] == pytest.approx([3e-3 * 11 / 12] * 4)
    totals = dict(made.update_totals)
    values, original = [], made.learner.update

    def update(*args):
        values.append(original(*args))
        return values[-1]

    made.learner.update = update
    metrics, _ = made.train_step()
    assert len(values) == 2
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx((totals[name] + values[0][name] + values[1][name]) / 3)


def test_options_of_the_update_exist(tmp_path):
    """finding 04: a renamed option would fall out of the list."""
    assert set(cases.options(tmp_path).flat()) >= UPDATE and not UPDATE & FREE


def test_other_frozen_weights_are_noticed(halfway, tmp_path):
    """finding 05: the same name and shapes; one parameter of the encoder differs in its last bit."""
    made = cases.trainer(cases.options(tmp_path, **FULL))
    before = base_fingerprint(made.policy)
    for parameter in made.policy.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert base_fingerprint(made.policy) == before
    frozen = next(p for p in made.policy.parameters() if not p.requires_grad)
    frozen.data.view(-1)[0:1].view(torch.int32).add_(1)
    saver = Saver(made.options, tmp_path)
    with pytest.raises(ConfigError, match=r"base model: its frozen weights are others(?s:.)*--allow_changed_config"):
        saver.resume(made, str(halfway))
    assert "changed: base model" in " ".join(saver.resume(made, str(halfway), allow_changed=True))


def test_the_state_of_earlier_versions_is_read(tmp_path):
    """They kept a loss scale for float16, null otherwise."""
    made, other = (cases.trainer(cases.options(tmp_path / name)) for name in "ab")
    made.train_step()
    other.load_state_dict({**made.state_dict(), "scaler": None})
    assert other.state_dict() == made.state_dict() and other.learner.applied == 1


# -- who holds what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_rank_that_writes_holds_weights_and_moments(tmp_path, monkeypatch, rank):
    """finding 06: what reaches the store of the second rank has no tensor in it."""
    options = cases.options(tmp_path)
    made = cases.trainer(options)
    made.train_step()
    saver = Saver(options, tmp_path)
    saver._identity(made)
    held = []
    monkeypatch.setattr(saver.store, "save", lambda saved, ranks: held.append(saved.tensors))
    saver.ranks = Ranks(rank, 2)
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value, value])
    saver._save(made, None)
    counts = {name: len(tensors) for name, tensors in held[0].items()}
    trained = sum(p.requires_grad for p in made.policy.parameters())
    assert counts == ({"weights": trained, "optimizer": 3 * trained} if rank == 0 else {"weights": 0, "optimizer": 0})
