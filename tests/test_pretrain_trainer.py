"""Updates by hand, frozen parts, exact resumes, and what is left in the folder."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pretrain_cases as cases
import pytest
import torch
from accelerate import Accelerator

from covo_rl.models import load_family
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.policy.patterns import PatternError
from covo_rl.resolve import ConfigError
from covo_rl.speech.training import DivergedError
from covo_rl.supervised.pretrain import run
from covo_rl.supervised.pretrain.config import read_pretrain
from covo_rl.supervised.pretrain.distill import Distiller
from covo_rl.supervised.pretrain.forward import Taught
from covo_rl.supervised.pretrain.freezing import decay_groups, frozen_digests, train_parts
from covo_rl.supervised.pretrain.run import FrozenChangedError, run_pretraining
from covo_rl.supervised.pretrain.trainer import PretrainTrainer
from covo_rl.train.checkpoint import CheckpointError
from covo_rl.train.guard import StoppedBySignal

TIMES = ("seconds", "data_seconds", "tokens_per_second")
ALL = ["audio_adapter", "llm", "lm_head"]


def options(**more):
    given = {"model": "m", "tasks": {"asr": {}}, "learning_rate": 1e-2, "steps": 4, "length": 192, **more}
    return read_pretrain(None, given)


def trainer(made=None, distiller=None, **more):
    return PretrainTrainer(options(**more), made or cases.tiny_family(), None, Accelerator(cpu=True), distiller)


def weights(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


# -- updates -----------------------------------------------------------------------------------------------------------


def test_micro_batches_are_one_batch_and_the_loss_is_the_mean_over_taught_ids():
    first, second = trainer(), trainer()
    documents = cases.mixed(first.family)
    rows, length = [documents[:1], documents[1:]], sum(map(len, documents[1:]))
    whole = cases.packed(first.family, rows, length)
    one = first.update([whole])
    two = second.update([cases.packed(second.family, [row], length) for row in rows])
    numbers = [len(Taught.of(cases.packed(first.family, [row])).targets) for row in rows]
    assert numbers[1] > 4 * numbers[0] and one["taught"] == two["taught"] == sum(numbers)  # a mean of means is another
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    assert one["loss"] == pytest.approx((one["loss_text"] * _count(whole, False, first) +
                                         one["loss_codes"] * _count(whole, True, first)) / sum(numbers))  # fmt: skip
    for name, value in weights(first.family).items():
        torch.testing.assert_close(dict(second.family.model.named_parameters())[name], value, atol=2e-4, rtol=0)
    tasks = {name.removeprefix("loss/") for name in one if name.startswith("loss/") and name.count("/") == 1}
    assert tasks == {"asr", "tts", "audio_only", "interleave_1", "text"}
    assert one["tokens"] == sum(map(len, documents)) and one["tokens/text"] == len(documents[1])
    assert one["padding"] == pytest.approx(1 - one["tokens"] / (2 * length))
    assert one["audio_seconds"] == pytest.approx(sum(0.04 * (b - a) for _, a, b in whole.clips), abs=0.01)


def _count(batch, codes, made):
    targets = Taught.of(batch).targets
    return int(((targets >= made.family.code_ids.start) == codes).sum())


def test_a_distiller_adds_its_gradient_before_the_step():
    class Distiller:
        def follow(self, policy):
            assert policy.family is made

        def backward(self, step):
            seen.append((step, float(made.lm_head.weight.grad.abs().sum())))
            made.lm_head.weight.grad.zero_()
            return {"distill_kl": 0.5}

    seen, made = [], cases.tiny_family()
    one = trainer(made, Distiller(), weight_decay=0.0, max_grad_norm=1e9)
    before = weights(made)
    line = one.update([cases.packed(made, [cases.mixed(made)])])
    assert line["distill_kl"] == 0.5 and seen[0][0] == 0 and seen[0][1] > 0
    assert torch.equal(made.lm_head.weight, before["llm.lm_head.weight"])  # its gradient was taken away
    assert not torch.equal(made.embed_tokens.weight, before["llm.model.embed_tokens.weight"])


def test_a_loss_that_is_no_number_stops_the_run_and_changes_nothing():
    made = cases.tiny_family()
    one = trainer(made)
    with torch.no_grad():
        made.model.llm.model.norm.weight.fill_(float("nan"))
    before = weights(made)
    with pytest.raises(DivergedError, match="step 1: loss nan"):
        one.update([cases.packed(made, [cases.mixed(made)])])
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items() if "norm" not in name)


def silenced(batch):
    batch.labels.fill_(IGNORE)
    return batch


def test_an_update_without_a_label_moves_nothing_and_is_said_and_only_they_stop_a_run():
    made = cases.tiny_family()
    one = trainer(made, steps=3)
    some = cases.packed(made, [cases.mixed(made)[:2]])
    one.update([some])
    before = weights(made)
    line = one.update([silenced(cases.packed(made, [cases.mixed(made)]))])
    assert line["step"] == 2 and line["taught"] == 0 and not any(name.startswith("loss") for name in line)
    assert line["tokens/asr"] > 0 and all(torch.equal(value, before[name]) for name, value in weights(made).items())
    assert one.update([silenced(cases.packed(made, [cases.mixed(made)])), some])["taught"] > 0  # a pass without one
    two = trainer(made, steps=2)
    two.update([silenced(some)])
    with pytest.raises(ConfigError, match="rows of the last 2 updates teach nothing"):
        two.update([some])


def test_rows_without_a_clip_ask_nothing_of_the_adapter_alone():
    made = cases.tiny_family()
    one = trainer(made, train_parts=["audio_adapter"])
    line = one.update([cases.packed(made, [[cases.mixed(made)[1]]])])
    assert line["loss"] > 0 and line["grad_norm"] == 0.0


# -- what trains -------------------------------------------------------------------------------------------------------


def test_parts_that_do_not_train_stay_and_those_that_do_move():
    made = cases.tiny_family()
    one = trainer(made, train_parts=["audio_adapter"])
    before = weights(made)
    one.update([cases.packed(made, [cases.mixed(made)])])
    changed = {name.split(".")[0] for name, value in weights(made).items() if not torch.equal(value, before[name])}
    assert (
        changed == {"audio_adapter"} and one.changed_parts() == [] and set(one.frozen) == {"encoder", "llm", "lm_head"}
    )
    with torch.no_grad():  # one bit of one weight
        bits = made.model.encoder.conv1.weight.view(torch.int32)
        bits[0, 0, 0] ^= 1
    assert one.changed_parts() == ["encoder"]


def test_a_part_that_is_not_there_is_an_error():
    with pytest.raises(PatternError, match="did you mean 'audio_adapter'"):
        train_parts(cases.tiny_family(), ["audio_adaptor"])


def test_norms_biases_and_embeddings_do_not_decay():
    made = cases.tiny_family()
    train_parts(made, ALL)
    assert "encoder" in frozen_digests(made)
    names = {id(p): name for name, p in made.model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in
              decay_groups(made, made.model, 0.1)}  # fmt: skip
    assert "llm.model.embed_tokens.weight" in groups[0.0] and "llm.lm_head.weight" in groups[0.1]
    assert all(name.endswith("bias") or "norm" in name or "embed" in name for name in groups[0.0])
    assert not any(name.endswith("bias") or "norm" in name for name in groups[0.1])
    assert not any(name.startswith("encoder") for part in groups.values() for name in part)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    rows = cases.write_rows(folder / "rows")
    model = cases.save_model(folder / "model")
    tasks = {"interleave_1": {"weight": 2}, "asr": {"weight": 1}, "text": {"weight": 1}}
    return {"model": model, "tasks": tasks, "learning_rate": 1e-2, "steps": 4, "length": 192, "warmup_steps": 1,
            "checkpoint_every": 2, **rows}  # fmt: skip


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Four updates without a break."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    config = read_pretrain(None, {**world, "output": str(output), "eval_tasks": {"asr": {}}, "eval_rows": 1})
    return config, run_pretraining(config)


def lines(folder, *without):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith(without)} for line in read]


def test_a_run_leaves_a_model_that_loads_its_options_and_its_figures(world, finished):
    config, folder = finished
    trained, start = load_family(str(folder)), load_family(world["model"])
    moved = {
        name.split(".")[0] for name, value in weights(trained).items() if not torch.equal(value, weights(start)[name])
    }
    assert moved == {"audio_adapter", "llm"}
    assert read_pretrain(folder / "pretrain.yaml") == config
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 4 and result["trained"].keys() == {*ALL} and result["frozen"].keys() == {"encoder"}
    assert result["last"]["eval_loss"] > 0 and result["last"]["loss"] == lines(folder)[-1]["loss"]
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4] and not (folder / ".partial-model").exists()
    assert lines(folder)[-1]["drawn/interleave_1"] > lines(folder)[0]["drawn/asr"] > 0


def test_a_stopped_run_goes_on_bit_for_bit(world, finished, tmp_path, monkeypatch):
    updates = PretrainTrainer.update

    def killed(self, batches):
        line = updates(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    config = read_pretrain(None, {**world, "output": str(tmp_path / "run")})
    monkeypatch.setattr(PretrainTrainer, "update", killed)
    with pytest.raises(StoppedBySignal) as stop:
        run_pretraining(config)
    assert stop.value.code == 75 and stop.value.saved.name == "step_000003"
    assert not (tmp_path / "run" / "config.json").exists()  # no model yet
    monkeypatch.undo()
    folder = run_pretraining(dataclasses.replace(config, resume=True))
    assert lines(folder) == lines(finished[1], "eval_")
    assert (folder / "model.safetensors").read_bytes() == (finished[1] / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_with_workers_and_a_teacher_is_stopped_while_it_distils_and_goes_on_bit_for_bit(
    world, tmp_path, monkeypatch
):
    """The model teaches its own copy, which the rows move away; rows are prepared in two processes, ahead."""
    (tmp_path / "prompts.jsonl").write_text("".join(
        json.dumps({"id": str(n), "prompt": f"{word} bell?"}) + "\n" for n, word in enumerate(cases.WORDS)
    ))  # fmt: skip
    distill = {"teacher": world["model"], "data": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 4,
               "prompts_per_update": 2}  # fmt: skip
    config = read_pretrain(None, {**world, "workers": 2, "distill": distill, "output": str(tmp_path / "whole")})
    whole = run_pretraining(config)
    backward = Distiller.backward

    def killed(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, step)

    monkeypatch.setattr(Distiller, "backward", killed)
    config = dataclasses.replace(config, output=str(tmp_path / "run"))
    with pytest.raises(StoppedBySignal) as stop:
        run_pretraining(config)
    assert stop.value.saved.name == "step_000003"
    monkeypatch.undo()
    folder = run_pretraining(dataclasses.replace(config, resume=True, workers=1))
    assert lines(folder, "distill_s") == lines(whole, "distill_s") and lines(folder)[-1]["distill_kl"] > 0
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_resume_with_other_options_or_of_damaged_checkpoints_is_refused(world, finished, tmp_path):
    config, folder = finished
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(ConfigError) as error:
        run_pretraining(
            dataclasses.replace(again, learning_rate=0.1, batch_size=2, tasks={**world["tasks"], "tts": {}})
        )
    first, second = error.value.problems
    assert "learning_rate 0.01 there, 0.1 now" in first and "1 rows an update there, 2 now" in second
    with pytest.raises(ConfigError, match="the state of the mixture is of another one"):
        run_pretraining(dataclasses.replace(again, tasks={**world["tasks"], "asr": {"weight": 5}}))
    copy = tmp_path / "copy"
    for step in ("step_000002", "step_000004"):
        (copy / "checkpoints" / step).mkdir(parents=True)
        for path in (folder / "checkpoints" / step).iterdir():
            (copy / "checkpoints" / step / path.name).write_bytes(path.read_bytes())
        (copy / "checkpoints" / step / "weights.safetensors").write_bytes(b"damaged")
    (copy / "pretrain.yaml").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is complete: step_000004: weights.safetensors has"):
        run_pretraining(dataclasses.replace(again, output=str(copy)))


def test_a_folder_that_is_taken_is_left_alone(world, finished, tmp_path, capsys):
    config, folder = finished
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"holds an earlier pre-training .*--resume, or --overwrite"):
        run_pretraining(config)
    with pytest.raises(ConfigError, match="is the model that the training starts from"):
        run_pretraining(dataclasses.replace(config, model=str(folder), overwrite=True))
    with pytest.raises(ConfigError, match="holds no pre-training"):
        run_pretraining(dataclasses.replace(config, output=str(tmp_path / "none"), resume=True))
    (tmp_path / "config.json").touch()
    assert "something else" in str(
        run.output_problem(dataclasses.replace(config, output=str(tmp_path), overwrite=True))
    )
    assert run_pretraining(dataclasses.replace(config, dry_run=True, overwrite=True)) == folder
    assert "dry run" in capsys.readouterr().out and (folder / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_frozen_weight_that_changed_is_not_saved(world, tmp_path, monkeypatch):
    updates = PretrainTrainer.update

    def disturbed(self, batches):
        line = updates(self, batches)
        with torch.no_grad():
            self.family.model.encoder.conv1.bias[0] += 1
        return line

    monkeypatch.setattr(PretrainTrainer, "update", disturbed)
    config = read_pretrain(None, {**world, "steps": 1, "warmup_steps": 0, "output": str(tmp_path / "run")})
    with pytest.raises(FrozenChangedError, match="encoder did not train and changed"):
        run_pretraining(config)
    assert not (Path(config.output) / "config.json").exists()
