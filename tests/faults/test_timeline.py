"""Going back to an earlier checkpoint starts a new timeline; what was later is moved aside, whole, and never used."""

import json
import os
import shutil
from functools import partial

import pytest
from test_resume import StopAfter, metrics, options_for, run_toy
from timelines import contents, copy_of, damage_all, dies_at, killed_at, names, set_keep_last, step, weights

from covo_rl.config import ConfigError
from covo_rl.train.checkpoint import CheckpointError, store, timeline
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StoppedBySignal
from covo_rl.train.ranks import Ranks


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Six steps, a checkpoint of each, and what a session leaves at its end."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        set_keep_last(patched, 99)
        run_toy(folder, steps=6)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"step 6 of the first timeline")
    (folder / "adapter" / "export.json").write_text("{}")
    (folder / "model").mkdir()  # somebody's own: it has no export.json
    (folder / "result.json").write_text('{"steps": 6}')
    (folder / "exports" / "step_000002").mkdir(parents=True)
    (folder / "exports" / "step_000004").mkdir()
    for index in (2, 3):  # dumped while that many steps were finished
        (folder / "debug" / f"step_{index:06d}").mkdir(parents=True)
    return folder


def test_the_new_timeline_never_meets_the_one_it_left(finished, tmp_path, monkeypatch):
    """finding 01: back to step 3 with another option; step 6 is the new policy's, and auto goes on from it."""
    run = copy_of(finished, tmp_path)
    change = {"num_iterations": 3, "steps": 6, "allow_changed": True}
    notes, _ = run_toy(run, resume=str(step(run, 3)), **change)
    aside = run / "abandoned" / "001"
    moved = next(note for note in notes if note.startswith(f"moved to {aside}"))
    for what in ("3 of checkpoints/", "1 of exports/", "3 of rollouts/", "1 of debug/", "adapter", "result.json"):
        assert what in moved
    assert names(aside / "checkpoints") == ["step_000004", "step_000005", "step_000006"]
    assert weights(aside / "checkpoints" / "step_000006") == weights(step(finished, 6)) != weights(step(run, 6))
    assert names(aside / "rollouts") == ["step_00004.jsonl", "step_00005.jsonl", "step_00006.jsonl"]
    assert names(aside / "exports") == ["step_000004"] and names(run / "exports") == ["step_000002"]
    assert names(aside / "debug") == ["step_000003"] and names(run / "debug") == ["step_000002"]
    assert (aside / "adapter" / "adapter_model.safetensors").is_file() and not (run / "adapter").exists()
    assert (run / "model").is_dir()
    old, new = (metrics(folder).splitlines() for folder in (finished, run))
    assert old[3:] == metrics(aside).splitlines()
    assert len(new) == 6 and new[:3] == old[:3] and new[5] != old[5]
    record = json.loads((aside / "moved.json").read_text())
    assert record["back_to"] == [3] and "result.json" in record["paths"]
    notes, _ = run_toy(run, resume="auto", num_iterations=3, steps=6)
    assert "step_000006" in notes[0] and not any("changed" in note for note in notes)


def test_with_the_same_options_the_same_end_is_reached_again(finished, tmp_path, monkeypatch):
    """finding 01"""
    set_keep_last(monkeypatch, 99)
    run = copy_of(finished, tmp_path)
    for number, back in enumerate((5, 2, 4), 1):
        run_toy(run, resume=str(step(run, back)), steps=6)
        assert metrics(run) == metrics(finished)
        assert weights(step(run, 6)) == weights(step(finished, 6))
        assert names(run / "abandoned") == [f"{n:03d}" for n in range(1, number + 1)]
        run_toy(run, resume="auto", steps=6)  # at the end already: nothing is later, nothing moves


def test_keep_last_counts_no_abandoned_checkpoint(finished, tmp_path, monkeypatch):
    """finding 01: with two kept, the new timeline's two newest stay, and the abandoned ones are all there."""
    run = copy_of(finished, tmp_path)
    set_keep_last(monkeypatch, 2)
    with pytest.raises(StoppedBySignal):
        run_toy(run, StopAfter(5), resume=str(step(run, 3)), steps=6)
    assert names(run / "checkpoints") == ["step_000004", "step_000004.002"]
    assert names(run / "abandoned" / "001" / "checkpoints") == ["step_000004", "step_000005", "step_000006"]
    run_toy(run, resume="auto", steps=6)
    assert metrics(run) == metrics(finished)


def test_a_kill_at_any_moment_of_the_move_leaves_one_timeline_or_the_other(finished, tmp_path, monkeypatch):
    """finding 01: the folder can be resumed each time, from step 3 once the move was decided, else from step 6."""
    deaths, starts = 0, []
    for number in range(1, 60):
        run = copy_of(finished, tmp_path / str(number))

        def go_back(run=run):
            timeline.move_aside(run, [3], len("".join(metrics(run).splitlines(keepends=True)[:3]).encode()))

        if not dies_at(number, monkeypatch, go_back):
            break
        deaths += 1
        notes, _ = run_toy(run, resume="auto", steps=6)
        starts.append("step_000003" in notes[0])
        assert metrics(run) == metrics(finished) and weights(step(run, 6)) == weights(step(finished, 6))
        assert starts[-1] or "step_000006" in notes[0]
        if starts[-1]:
            aside = run / "abandoned" / "001"
            assert names(aside / "checkpoints") == ["step_000004", "step_000005", "step_000006"]
            assert metrics(aside) == "".join(metrics(finished).splitlines(keepends=True)[3:])
            assert not (aside / "moving.json").exists()
    assert deaths > 12 and starts.count(False) <= 2 and starts == sorted(starts)


def test_a_kill_between_the_move_and_the_first_save_loses_nothing(finished, tmp_path):
    """finding 01"""
    run = copy_of(finished, tmp_path)
    timeline.move_aside(run, [3], len("".join(metrics(run).splitlines(keepends=True)[:3]).encode()))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "of": "the new timeline", "half a li')
    notes, _ = run_toy(run, resume="auto", steps=6)
    assert "step_000003" in notes[0]
    assert metrics(run) == metrics(finished)
    assert metrics(run / "abandoned" / "002") == '{"step": 4, "of": "the new timeline", "half a li'


def test_an_abandoned_checkpoint_can_be_taken_up_again(finished, tmp_path, monkeypatch):
    """finding 01: from its place under abandoned/, the run in the folder being moved aside in its turn."""
    set_keep_last(monkeypatch, 99)
    run = copy_of(finished, tmp_path)
    run_toy(run, resume=str(step(run, 3)), steps=6, num_iterations=3, allow_changed=True)
    abandoned = run / "abandoned" / "001" / "checkpoints" / "step_000005"
    run_toy(run, resume=str(abandoned), steps=6)
    assert weights(step(run, 6)) == weights(step(finished, 6))
    assert metrics(run).splitlines() == metrics(finished).splitlines()[5:]
    assert len(metrics(run / "abandoned" / "002").splitlines()) == 6
    assert names(run / "checkpoints") == ["step_000006"] and abandoned.is_dir()


def test_a_checkpoint_of_another_folder_does_not_mix_with_the_run_there(finished, tmp_path):
    """finding 01"""
    run = tmp_path / "other"
    run_toy(run, steps=4, num_iterations=1)
    before = metrics(run)
    run_toy(run, resume=str(step(finished, 3)), steps=6)
    assert metrics(run).splitlines() == metrics(finished).splitlines()[3:]
    assert metrics(run / "abandoned" / "001") == before
    assert names(run / "rollouts") == [f"step_{n:05d}.jsonl" for n in (4, 5, 6)]


def test_starting_over_in_a_finished_folder_deletes_nothing(finished, tmp_path):
    """finding 02"""
    run = copy_of(finished, tmp_path)
    notes, _ = run_toy(run, steps=6, num_iterations=1)
    assert any("6 of checkpoints/" in note for note in notes)
    before, after = contents(finished), contents(run / "abandoned" / "001")
    after.pop("moved.json")
    assert after == before


def test_with_only_damaged_checkpoints_auto_refuses_and_touches_nothing(finished, tmp_path):
    """finding 02"""
    run = copy_of(finished, tmp_path)
    damage_all(run)
    before = contents(run)
    expected = r"no checkpoint under .* is complete: step_000006: optimizer\.safetensors has changed.*another --output"
    with pytest.raises(CheckpointError, match=expected):
        run_toy(run, resume="auto", steps=8, allow_changed=True)
    assert contents(run) == before
    shutil.move(run / "checkpoints", tmp_path / "away")  # as the message says
    notes, _ = run_toy(run, resume="auto", steps=6)
    assert "starting from the first step" in notes[0] and metrics(run) == metrics(finished)
    assert metrics(run / "abandoned" / "001") == metrics(finished)


def test_damaged_newer_checkpoints_are_moved_with_the_lines_after_the_next_valid_one(finished, tmp_path, monkeypatch):
    """finding 02: they are named, count for nothing, and the lower numbers that follow are not thinned out."""
    set_keep_last(monkeypatch, 2)
    run = copy_of(finished, tmp_path)
    for number in (5, 6):
        (step(run, number) / "state.json").write_bytes(b"{}")
    with pytest.raises(StoppedBySignal):
        run_toy(run, StopAfter(3), resume="auto", steps=6)
    assert names(run / "checkpoints") == ["step_000004", "step_000005"]
    run_toy(run, resume="auto", steps=6)
    assert metrics(run) == metrics(finished)
    assert names(run / "abandoned" / "001" / "checkpoints") == ["step_000005", "step_000006"]


def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_others(finished, tmp_path):
    """finding 03"""
    run = copy_of(finished, tmp_path)
    (step(run, 3) / "rank_00000.json").unlink()
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"step_000003 is not .*rank_00000.json is missing.*step_000006"):
        run_toy(run, resume=str(step(run, 3)), steps=6)
    with pytest.raises(CheckpointError, match=r"no complete\.json"):
        run_toy(run, resume=str(run), steps=6)
    assert contents(run) == before


def test_results_go_aside_when_a_finished_run_trains_on(finished, tmp_path):
    """finding 01: until it has come to its new end, nothing there says that step 6 is the end."""
    run = copy_of(finished, tmp_path)
    notes, _ = run_toy(run, resume="auto", steps=6)
    assert (run / "result.json").is_file() and not any("moved" in note for note in notes)
    notes, _ = run_toy(run, resume="auto", steps=8, allow_changed=True)
    assert any(note.endswith("goes on from before it: adapter, result.json") for note in notes)
    assert names(run / "abandoned" / "001") == ["adapter", "moved.json", "result.json"]
    assert len(metrics(run).splitlines()) == 8 and metrics(run).startswith(metrics(finished))


def test_metrics_that_are_gone_are_noticed(finished, tmp_path):
    """finding 01: a log that is shorter than the checkpoint knew it is refused, and nothing moves."""
    run = copy_of(finished, tmp_path)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="was edited or replaced"):
        run_toy(run, resume=str(step(run, 3)), steps=6)
    assert len(names(run / "checkpoints")) == 6 and not (run / "abandoned").exists()


def test_a_resume_that_is_refused_moves_nothing(finished, tmp_path):
    """finding 01"""
    run = copy_of(finished, tmp_path)
    before = contents(run)
    with pytest.raises(ConfigError, match="num_iterations"):
        run_toy(run, resume=str(step(run, 3)), steps=6, num_iterations=3)
    assert contents(run) == before


def test_checkpoints_on_another_disk_are_copied_before_they_are_deleted(finished, tmp_path, monkeypatch):
    """finding 01: and a kill at any moment of that is made good by the next start."""
    original, deaths = os.replace, 0

    def other_disk(source, target):
        if source.parent.name == "checkpoints" and "abandoned" not in source.parts:
            raise OSError(18, "Invalid cross-device link")
        original(source, target)

    monkeypatch.setattr(os, "replace", other_disk)
    size = len("".join(metrics(finished).splitlines(keepends=True)[:3]).encode())
    for number in range(1, 30):
        run = copy_of(finished, tmp_path / str(number))
        move = partial(timeline.move_aside, run, [3], size)
        if not killed_at(number, monkeypatch, [(shutil, "copytree")], move, after=True)[0]:
            break
        deaths += 1
        timeline.finish_moving(run)
        assert names(run / "checkpoints") == ["step_000001", "step_000002", "step_000003"]
        assert names(run / "abandoned" / "001" / "checkpoints") == ["step_000004", "step_000005", "step_000006"]
    assert deaths == 3
    assert contents(run / "abandoned" / "001" / "checkpoints" / "step_000006") == contents(step(finished, 6))


def test_a_resume_reads_its_checkpoint_once_for_its_checksums(finished, tmp_path, monkeypatch):
    """finding 03: of a large model that is minutes, and was done twice before the weights were read."""
    run, checked, original = copy_of(finished, tmp_path / "run"), [], store.damage
    monkeypatch.setattr(store, "damage", lambda path: checked.append(path.name) or original(path))
    run_toy(run, resume=str(step(run, 3)), steps=6)
    assert checked.count("step_000003") == 1


def test_only_the_first_rank_moves(finished, tmp_path, monkeypatch):
    """finding 01"""
    run = copy_of(finished, tmp_path)
    saver = Saver(options_for(run), run)
    saver.ranks = Ranks(1, 2)
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [None, value])
    assert saver._move_aside([3], 0) == [] and len(names(run / "checkpoints")) == 6
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: ["no space left", value])
    with pytest.raises(CheckpointError, match="rank 0: no space left"):
        saver._move_aside([3], 0)
