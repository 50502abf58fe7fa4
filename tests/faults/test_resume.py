"""A run that is stopped and resumed anywhere ends with the metrics of the undisturbed run, bit for bit.

The run is toy.py: the real saver, sampler, advantages, loss and logs around a table of logits as the policy, with
rollouts drawn from the global random state.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import toy

from covo_rl.config import ConfigError, Options
from covo_rl.duplex.config import DuplexOptions
from covo_rl.records.folder import Run
from covo_rl.train.checkpoint import CheckpointError, CheckpointStore, state
from covo_rl.train.checkpoint import tensors as files
from covo_rl.train.checkpoint.identity import FREE, ROUNDING, data_fingerprint, differences
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip, Example


def options_for(folder, **changes):
    arguments = toy.parse(["--output", str(folder), "--num-iterations", "2", "--steps-per-generation", "2"])
    for name, value in changes.items():
        setattr(arguments, name, value)
    return toy.options_of(arguments)


def run_toy(folder, stop=None, allow_changed=False, **changes):
    options = options_for(folder, **changes)
    trainer = toy.ToyTrainer(options, toy.rows())
    saver = Saver(options, folder, stop)
    notes = saver.resume(trainer, options.train.resume, allow_changed=allow_changed)
    trainer.run(saver, Run(folder))
    return notes, saver


def metrics(folder):
    return (Path(folder) / "metrics.jsonl").read_text()


class StopAfter(StopSignals):
    """Reports a signal from the n-th look on."""

    def __init__(self, looks):
        super().__init__()
        self._looks = looks

    @property
    def received(self):
        self._looks -= 1
        return "SIGTERM" if self._looks < 0 else None

    @received.setter
    def received(self, value):
        assert value is None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """12 steps of 4 prompts from 10 rows: across four epoch boundaries, with resampled groups."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_toy(folder)
    return folder


def test_stopped_after_any_update_the_run_ends_with_the_same_metrics(undisturbed, tmp_path):
    """Four updates a step, 12 steps: stop at each of 48 moments in turn, going on from each."""
    moments = 0
    while True:
        try:
            run_toy(tmp_path, StopAfter(0), resume="auto")
        except StoppedBySignal as stopped:
            assert stopped.code == 75 and "SIGTERM" in stopped.message
            moments += 1
            assert moments < 100
        else:
            break
    assert moments == 48
    assert metrics(tmp_path) == metrics(undisturbed)
    assert len(list((tmp_path / "rollouts").iterdir())) == 12


def test_log_lines_after_the_checkpoint_are_cut(undisturbed, tmp_path):
    """The run died after step 7 with a checkpoint of step 5: steps 6 and 7 must not appear twice."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path / "part", StopAfter(4 * 5 - 1))
    shutil.copytree(tmp_path / "part" / "checkpoints", tmp_path / "checkpoints")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"half a li')
    notes, _ = run_toy(tmp_path, resume="auto")
    assert "resumed from" in notes[0] and "step 5" in notes[0]
    assert metrics(tmp_path) == metrics(undisturbed)


@pytest.mark.parametrize("forgotten", ["random", "schedule", "optimizer", "old_logps", "sampler", "totals"])
def test_the_comparison_notices_whatever_a_resume_forgets(undisturbed, tmp_path, monkeypatch, forgotten):
    """The oracle of this file is sharp: leave one thing out of `restore` and the metrics differ."""
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path, StopAfter(16))
    nothing = lambda *args, **kwargs: None  # noqa: E731
    if forgotten == "random":
        monkeypatch.setattr(state, "load_random_state", nothing)
    elif forgotten == "optimizer":
        monkeypatch.setattr(state, "load_optimizer_state", nothing)
    elif forgotten == "schedule":
        monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "load_state_dict", nothing)
    elif forgotten == "old_logps":
        original = state.unpack_batch

        def without(*args):
            batch = original(*args)
            batch.old_logps = [torch.zeros_like(x) for x in batch.old_logps]
            return batch

        monkeypatch.setattr(state, "unpack_batch", without)
    elif forgotten == "sampler":
        monkeypatch.setattr(toy.PromptSampler, "load_state_dict", nothing)
    else:
        original_load = toy.ToyTrainer.load_state_dict
        monkeypatch.setattr(toy.ToyTrainer, "load_state_dict", lambda self, s: original_load(self, {**s, "totals": {}}))
    run_toy(tmp_path, resume="auto")
    assert metrics(tmp_path) != metrics(undisturbed)


def test_a_damaged_newest_checkpoint_costs_one_step_only(undisturbed, tmp_path):
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path, StopAfter(30))
    newest = CheckpointStore(tmp_path / "checkpoints").all()[-1]
    (newest / "weights.safetensors").write_bytes(b"")
    notes, _ = run_toy(tmp_path, resume="auto")
    assert any("passed over" in line and newest.name in line for line in notes)
    assert metrics(tmp_path) == metrics(undisturbed)


def test_auto_without_a_checkpoint_starts_from_the_first_step(undisturbed, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "of": "a run that died before its first checkpoint"}\n')
    notes, _ = run_toy(tmp_path, resume="auto")
    assert "starting from the first step" in notes[0]
    assert metrics(tmp_path) == metrics(undisturbed)


def test_a_new_run_does_not_write_over_an_unfinished_one(undisturbed, tmp_path):
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path, StopAfter(6))
    with pytest.raises(ConfigError, match=r"unfinished run \(step_000001\.\d+\): continue it with --resume auto"):
        run_toy(tmp_path)
    run_toy(tmp_path, resume="auto")
    run_toy(tmp_path)  # finished: starting over is fine, and leaves no old line behind
    assert metrics(tmp_path) == metrics(undisturbed)


def test_changes_are_shown_and_refused_unless_allowed(tmp_path):
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path, StopAfter(6))
    with pytest.raises(ConfigError, match=r"num_iterations: 2 in the checkpoint, 3 now(?s:.)*--allow_changed_config"):
        run_toy(tmp_path, resume="auto", num_iterations=3)
    notes, _ = run_toy(tmp_path, resume="auto", num_iterations=3, allow_changed=True)
    assert "changed: num_iterations: 2 in the checkpoint, 3 now" in notes


def test_changed_data_is_noticed_and_paths_are_not(monkeypatch, tmp_path):
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path, StopAfter(6))
    original = toy.rows
    monkeypatch.setattr(toy, "rows", lambda: original()[::-1])
    with pytest.raises(ConfigError, match="content or order has changed"):
        run_toy(tmp_path, resume="auto")
    rows = [Example("1", (Clip(path="/here/a.wav"),), "q", ("x",), "x")]
    moved = [Example("1", (Clip(path="/there/a.wav"),), "q", ("x",), "x")]
    assert data_fingerprint(rows) == data_fingerprint(moved)
    before, after = ({"config": {}, "data": data_fingerprint(some)} for some in (rows, []))
    assert differences(before, after) == (["training data: 1 rows in the checkpoint, 0 now"], [])


def test_options_are_sorted_into_serious_rounding_and_free():
    before = Options().flat()
    after = {**before, "output": "elsewhere", "micro_batch_prompts": 4, "learning_rate": 1.0}
    data = data_fingerprint([])
    serious, rounding = differences({"config": before, "data": data}, {"config": after, "data": data})
    assert serious == ["learning_rate: 1e-06 in the checkpoint, 1.0 now"]
    assert rounding == ["micro_batch_prompts: 32 in the checkpoint, 4 now"]
    assert {*DuplexOptions().flat()} >= FREE | ROUNDING, "an option was renamed: the list in saver.py is out of date"


def test_a_model_that_the_run_made_moves_with_its_folder():
    """As the supervised stage of a duplex run leaves one in RUN/sft."""

    def changes(model, output):
        sides = [{"config": {"model": m, "output": o}, "data": data_fingerprint([])}
                 for m, o in (("runs/a/sft", "runs/a"), (model, output))]  # fmt: skip
        return differences(*sides)[0]

    assert changes("/elsewhere/b/sft", "/elsewhere/b/") == []
    assert len(changes("runs/a/other", "runs/a")) == len(changes("runs/c/sft", "runs/b")) == 1


def test_edited_metrics_are_not_cut_blindly(tmp_path):
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path, StopAfter(9))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="was edited or replaced"):
        run_toy(tmp_path, resume="auto")


def test_resume_from_a_named_folder(undisturbed, tmp_path):
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path, StopAfter(22))
    named = CheckpointStore(tmp_path / "checkpoints").all()[0]
    run_toy(tmp_path, resume=str(named))
    assert metrics(tmp_path) == metrics(undisturbed)
    with pytest.raises(CheckpointError, match="no such folder"):
        run_toy(tmp_path, resume=str(tmp_path / "nowhere"))


def test_saving_by_the_clock_happens_between_updates(tmp_path, monkeypatch):
    now = [0.0]

    def monotonic():
        now[0] += 7.0  # every look at the clock finds seven seconds gone
        return now[0]

    monkeypatch.setattr("covo_rl.train.checkpoint.saver.time.monotonic", monotonic)
    saved = []
    original = CheckpointStore.save
    monkeypatch.setattr(
        CheckpointStore, "save", lambda self, s, r=None: (saved.append(s.name), original(self, s, r))[1]
    )
    run_toy(tmp_path, checkpoint_every=0, checkpoint_minutes=0.5, steps=4)
    # 30 s are over at every fifth look; the last save is the end of the run
    assert saved == ["step_000001.001", "step_000002.002", "step_000003.003", "step_000004"]


def test_a_periodic_save_that_fails_does_not_stop_the_run(undisturbed, tmp_path, monkeypatch):
    original, calls = files.save_file, []

    def sometimes_full(tensors, path, **more):
        calls.append(path)
        if "step_000005" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path, **more)

    monkeypatch.setattr(files, "save_file", sometimes_full)
    _, saver = run_toy(tmp_path)
    assert saver.failures == 1
    assert metrics(tmp_path) == metrics(undisturbed)

    def always_full(tensors, path, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", always_full)
    with pytest.raises(CheckpointError, match="step_000012 was not saved"):
        run_toy(tmp_path / "other")


def test_a_checkpoint_in_mid_batch_needs_as_many_ranks(tmp_path):
    with pytest.raises(StoppedBySignal):
        run_toy(tmp_path, StopAfter(6))
    store = CheckpointStore(tmp_path / "checkpoints")
    middle, boundary = store.all()[-1], store.all()[0]
    about = json.loads((boundary / "complete.json").read_text())
    assert about["world"] == 1 and about["update"] == 0

    class Two(Ranks):
        def gathered(self, value):
            return [value, value]

    with pytest.raises(CheckpointError, match=r"by 1 ranks, and only as many can go on with it, not 2.*step_000001"):
        store.load(middle, Two(0, 2))
    assert store.load(boundary, Two(1, 2)).rank == {}
    assert store.load(boundary, Two(0, 2)).rank["batch"] is None
