"""Supervised updates and RL of timing on a model of random weights: what they compute, a run, and its resume."""

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from covo_rl.config import ConfigError
from covo_rl.duplex.config import TIMING_ESTIMATORS, duplex_options, read_layers
from covo_rl.duplex.features import draw_streams
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.layout import read_chunks
from covo_rl.duplex.questions import FeatureWorld
from covo_rl.duplex.rollout import score_stops
from covo_rl.duplex.supervised import LessonWeights, supervised_loss
from covo_rl.duplex.timing import ESTIMATORS
from covo_rl.duplex.training import TimingTrainer, question_logits
from covo_rl.duplex.trunk import stop_logits
from covo_rl.policy import Policy
from covo_rl.resolve import find
from covo_rl.rewards import components
from covo_rl.run.timing import dry_timing, run_timing
from covo_rl.speech.training import DivergedError
from covo_rl.supervised.duplex_stage import new_duplex_family, next_batch, taught_already
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.types import UserError

CONFIG = find("recipes", "configs/tiny_duplex.yaml")
SMALL = {"prompts_per_step": 6, "micro_batch_prompts": 4, "max_steps": 4, "duplex_width": 32, "rl_streams": 12,
         "test_streams": 12, "sft_streams": 40, "sft_steps": 3, "sft_batch": 4, "num_generations": 4}  # fmt: skip


@pytest.fixture(scope="module")
def family():
    return new_duplex_family(32, 2, seed=0)


@pytest.fixture(scope="module")
def world(family):
    return FeatureWorld.of(family, DuplexIds.of(family))


def small(**more):
    return duplex_options({str(CONFIG): yaml.safe_load(CONFIG.read_text()), "test": {**SMALL, **more}})


def test_the_ids_of_a_new_model_are_those_before_its_codes(family):
    config = family.model.config
    assert [config.duplex[name] for name in ("think", "shift", "break")] == [
        config.audio_token_index - 3 + i for i in range(3)
    ]


def test_a_lesson_says_what_the_stream_prescribes(world):
    for stream in draw_streams("sft", 12, seed=3):
        lesson = world.lessons([stream])[0]
        decisions = read_chunks(lesson.ids[lesson.taught_from :], world.ids)
        kinds = [world.ids.kind(decision.token).value for decision in decisions]
        assert len(decisions) == stream.chunks == len(lesson.features_UD) == len(lesson.places)
        assert kinds.index("SHIFT") == stream.shift_chunk and kinds.index("BREAK") == stream.break_chunk
        assert set(kinds[: stream.shift_chunk] + kinds[stream.break_chunk + 1 :]) == {"THINK"}


def test_a_question_is_the_lesson_up_to_its_last_decision(world):
    for stream in draw_streams("rl", 20, seed=3):
        question = world.questions([stream])[0]
        assert question.trunk.decisions == stream.decisions and len(question.features_UD) == len(question.trunk.places)
        if not stream.listening and stream.gold_stop == stream.decisions:
            lesson = world.lessons([stream])[0]
            assert lesson.ids[: len(question.trunk.ids) - 1] == question.trunk.ids[:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_supervised_loss_is_the_weighted_mean_over_single_lessons(family, world, dtype):
    family.model.to(dtype)
    lessons, weights = world.lessons(draw_streams("sft", 3, seed=5)), LessonWeights(3.0, 1.0, 0.5)
    together, figures = supervised_loss(family, lessons, world.ids, weights)
    total = {"decision": 3.0, "text": 1.0, "code": 0.5}
    parts = [supervised_loss(family, [lesson], world.ids, weights)[1] for lesson in lessons]
    up = sum(p[f"loss_{n}"] * p[f"targets_{n}"] * w for p in parts for n, w in total.items())
    down = sum(p[f"targets_{n}"] * w for p in parts for n, w in total.items())
    assert together.item() == pytest.approx(up / down, rel=1e-5 if dtype == torch.float32 else 2e-2)
    chunks = sum(len(lesson.places) for lesson in lessons)
    assert figures["targets_decision"] + figures["targets_code"] / 4 == chunks
    assert figures["targets_text"] == figures["targets_code"] / 4
    family.model.to(torch.float32)


def test_lessons_of_a_batch_are_of_about_one_length():
    import numpy as np

    order = [type("Lesson", (), {"ids": range(n)})() for n in range(1000)]
    lengths = [len(lesson.ids) for lesson in next_batch(order, 16, np.random.default_rng(0))]
    assert len(set(lengths)) == 16 and max(lengths) - min(lengths) < 64


def trainer_of(options, family):
    for parameter in family.decoder.parameters():
        parameter.requires_grad_(True)
    policy = Policy(family, keep_reference=True)
    world = FeatureWorld.of(family, DuplexIds.of(family))
    questions = world.questions(draw_streams("rl", options.duplex.rl_streams, options.train.seed))
    return TimingTrainer(options, options.timing, policy, questions, world.ids)


def test_a_step_is_one_forward_whose_rollouts_are_stops(tmp_path):
    trainer = trainer_of(small(output=str(tmp_path), beta=0.001), new_duplex_family(32, 2, seed=0))
    metrics, batch = trainer.train_step()
    assert len(batch.questions) == len(batch.z) == 6 and batch.stops_PG.shape == batch.advantages_PG.shape == (6, 4)
    for question, z_K, stops_G, scored in zip(batch.questions, batch.z, batch.stops_PG, batch.rewards, strict=True):
        assert len(z_K) == question.stream.decisions == len(scored.total_S) - 1
        assert all(0 <= stop <= question.stream.decisions for stop in stops_G)
        assert scored is trainer.rewards[question.stream.id]
    assert abs(batch.advantages_PG.sum(1)).max() < 1e-6
    assert metrics["grad_norm"] > 0 and metrics["timing/kl"] == pytest.approx(0, abs=1e-6) and metrics["step"] == 1


def test_every_question_has_its_own_logits_whatever_goes_through_with_it(family, world):
    """They go through the model by length, and come back in their order; in 16 bits to what these tell apart."""
    questions = world.questions(draw_streams("rl", 12, seed=8))
    alone = [question_logits(family, [question], world.ids)[0] for question in questions]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        family.model.to(dtype)
        together = question_logits(family, questions, world.ids, batch_size=5)
        family.model.to(torch.float32)
        for one, other in zip(together, alone, strict=True):
            assert (one - other).abs().max() < tolerance


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    weights = []
    for size in (1, 6):
        family = new_duplex_family(32, 2, seed=0)
        trainer_of(small(output=str(tmp_path), micro_batch_prompts=size), family).train_step()
        weights.append(torch.cat([p.flatten() for p in family.decoder.parameters()]).detach())
    assert (weights[0] - weights[1]).abs().max() < 1e-5


def test_references_are_those_of_the_policy_before_training(tmp_path):
    family = new_duplex_family(32, 2, seed=0)
    trainer = trainer_of(small(output=str(tmp_path), beta=0.1), family)
    question = next(iter(trainer.questions.values()))
    start = stop_logits(family, [question.trunk], [question.features_UD], trainer.ids)[0].detach()
    trainer.train_step()
    moved = question_logits(family, [question], trainer.ids)[0]
    kept = trainer.learner._references([question])[0]
    assert (kept - start).abs().max() < 1e-5 < (moved - start).abs().max()


def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path):
    def run(folder, steps, resume=None):
        family = new_duplex_family(32, 2, seed=0)
        options = small(output=str(folder), max_steps=4, checkpoint_every=2)
        trainer = trainer_of(options, family)
        saver = Saver(options, folder)
        saver.resume(trainer, resume)
        while trainer.step < steps:
            trainer.train_step()
            saver.after_step(trainer)
        return torch.cat([p.flatten() for p in family.decoder.parameters()]).detach()

    whole = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    assert torch.equal(whole, run(tmp_path / "b", 4, resume="auto"))


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_trackers_get_the_steps_and_the_figures_before_and_after(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("covo_rl.run.timing.TimingSession.export", lambda self: self.run.folder / "model")
    options = small(output=str(tmp_path), max_steps=2, duplex_width=16, report_to="tensorboard")
    result = json.loads(run_timing(options).read_text())
    log = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0})
    log.Reload()
    assert [event.step for event in log.Scalars("reward_total")] == [1, 2]
    early = [(event.step, event.value) for event in log.Scalars("eval/greedy/early_long_pause")]
    assert early == [(0, pytest.approx(result["before"]["early_long_pause"])),
                     (2, pytest.approx(result["after"]["early_long_pause"]))]  # fmt: skip


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_taught(tmp_path, monkeypatch):
    monkeypatch.setattr("covo_rl.records.trackers.package_versions", lambda names: dict.fromkeys(names))
    with pytest.raises(ConfigError, match="report_to wandb: it is not installed"):
        run_timing(small(output=str(tmp_path / "run"), report_to="wandb"))
    assert not (tmp_path / "run").exists()


def test_the_recipe_writes_figures_before_and_after(tmp_path):
    words = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(find("recipes", "grpo_duplex.py")), "--seed", "3", "--output", str(tmp_path / "run")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    names = {"early_long_pause", "single_turn_success", "back_channel_ignored", "barge_in_success", "delay_p50"}
    assert (
        names <= {*result["before"]} & {*result["after"]} and result["seconds"] > 0 and len(result["threshold"]) == 10
    )
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4
    again = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert again.returncode == 1 and "holds a finished run" in again.stderr
    (tmp_path / "run/result.json").unlink()  # as a kill after the last checkpoint leaves it
    resumed = subprocess.run(
        [*command, *words, "--resume", "auto"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["after"] == result["after"]
    options = small(seed=3, output=str(tmp_path / "run"))
    assert taught_already(options, tmp_path / "run/sft")
    assert not taught_already(small(seed=4), tmp_path / "run/sft")


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--timing-estimater", "mix"], "did you mean timing_estimator"), (["--noise", "-1"], "noise -1"),
     (["--control", "gould"], "choose none, shuffled, gold or no_cue"), (["--seed"], "options are --NAME VALUE"),
     (["--learning_rate", "0", "--noise", "-1"], "learning_rate 0")],
)  # fmt: skip
def test_options_that_cannot_be_are_named(words, said):
    with pytest.raises(ConfigError, match=said):
        duplex_options(read_layers(words, Path(CONFIG)))


def words(*more, config=CONFIG):
    return duplex_options(read_layers(more, Path(config)))


def test_flags_are_written_as_everywhere():
    options = words("--dry-run", "--no-log-rollouts", "--train-parts", "llm", "--noise=0.5", "--seed", "4")
    assert options.train.dry_run and not options.train.log_rollouts and options.adapter.train_parts == ["llm"]
    assert options.duplex.noise == 0.5 and options.train.seed == 4
    assert not words("--full", "--lora-r", "8").adapter.lora


def test_the_estimators_that_can_be_chosen_are_those_there_are():
    assert (*ESTIMATORS,) == TIMING_ESTIMATORS


@pytest.mark.parametrize(
    "more",
    [["--temperature", "0.7"], ["--listen-every", "2"], ["--num-iterations", "2"], ["--loss-type", "grpo"],
     ["--keep-best"], ["--oom-retry"], ["--no-evaluate"], ["--data", "rows.json"], ["--reward-gate", "format"],
     ["--use-vllm"], ["--scale-rewards", "batch"], ["--seed", "-1"], ["--train-parts", "llm", "encoder"],
     ["--lora", "true", "--modules-to-save", "audio_adapter"]],
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused(more):
    with pytest.raises(ConfigError) as caught:
        words(*more)
    named = [word[2:].replace("-", "_").removeprefix("no_") for word in more if word.startswith("--")]
    assert any(name in str(caught.value) for name in named) and len(caught.value.problems) == 1


def test_what_is_wrong_is_said_before_anything_is_taught(tmp_path, monkeypatch):
    monkeypatch.setattr("covo_rl.run.timing_start.teach_duplex", lambda *_: pytest.fail("taught"))
    refused = {
        "accuracy does not judge": {"rewards": "accuracy"},
        "judges all of its stops": {"rewards": "turn_taking,response_delay"},  # says nothing of a model that speaks
        "nothing_like_it": {"rewards": "nothing_like_it"},
        "train_parts": {"train_parts": ["llm", "tail"]},
    }
    for said, more in refused.items():
        with pytest.raises(UserError, match=said):
            run_timing(small(output=str(tmp_path / "run"), **more))
    for more in ({}, {"lora": True}):
        dry_timing(small(output=str(tmp_path / "run"), dry_run=True, **more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("world", "words"), [("1", ["--dry-run"]), ("2", [])])
def test_the_stage_alone_says_what_is_in_its_way_before_it_is_loaded(world, words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    (tmp_path / "file").touch()
    stage = runpy.run_path(str(find("recipes", "sft_duplex.py")))["main"]
    with pytest.raises(SystemExit) as stopped:
        stage([*words, "--output", str(tmp_path / "file" / "out")])
    said = str(stopped.value.code)
    assert "cannot be written" in said and ("dry_run" in said) == bool(words) and ("2 processes" in said) != bool(words)


def test_a_stage_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def stopped(options, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise DivergedError("step 3: loss nan")

    monkeypatch.setattr("covo_rl.supervised.duplex_stage.teach_duplex", stopped)
    with pytest.raises(SystemExit, match="loss nan"):
        runpy.run_path(str(find("recipes", "sft_duplex.py")))["main"](["--output", str(tmp_path / "out")])
    assert not [*tmp_path.iterdir()]


def test_a_model_of_somebody_else_is_not_replaced(tmp_path):
    theirs = tmp_path / "sft" / "model.safetensors"
    theirs.parent.mkdir()
    theirs.write_bytes(b"weeks of work")
    with pytest.raises(ConfigError, match="holds another model"):
        run_timing(small(output=str(tmp_path)))
    assert theirs.read_bytes() == b"weeks of work"


def test_a_reward_that_judges_some_stops_only_is_named():
    stream = draw_streams("rl", {"single": 1}, seed=0)[0]

    def patchy(completions, shift_time, **kwargs):
        return [None if time is None else 1.0 for time in shift_time]

    both = components({"early_response": 1.0, patchy: 1.0})
    scored = score_stops([stream], both)[0]
    assert [*scored.parts] == ["early_response"]
    assert scored.failures == {"patchy": f"judges {stream.decisions} of {stream.decisions + 1} stops"}
