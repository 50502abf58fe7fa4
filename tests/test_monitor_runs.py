"""Advice, listening and trackers in a run: they see it, and change nothing about it."""

import json
import re
import statistics
import time
from pathlib import Path

import pytest

from covo_rl import synth
from covo_rl.config import ConfigError, parse_options
from covo_rl.records import trackers as tracker_room
from covo_rl.run.session import Session

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    questions = synth.render_set(tmp_path_factory.mktemp("questions"), seed=7, train=22, validation=11, test=22)
    return ["--config", CONFIG, "--data", questions["train"], "--eval-data", questions["test"], "--prompts-per-step", 2,
            "--num-generations", 2, "--max-completion-length", 12, "--limit", 4, "--eval-limit", 6, "--beta", 0.01,
            "--check-rewards", "false"]  # fmt: skip


def session_of(*words):
    return Session(parse_options([str(word) for word in words]))


def trained(folder, *words):
    """Evaluate before, train, end without an export; the lines of metrics.jsonl without times, and the parameters."""
    session = session_of(*words, "--output", folder)
    session.before()
    trainer = session.train()
    session.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, {name: p.detach().clone() for name, p in trainer.policy.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def plain_run(words, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain") / "run", *words, "--max-steps", 6)


@pytest.fixture(scope="module")
def watched(words, tmp_path_factory):
    """The same run with everything that watches, in two parts: four steps, and after a resume two more."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("watched") / "run"
    more = ["--max-steps", 6, "--listen-every", 2, "--listen-rows", 3, "--report-to", "tensorboard"]
    session = session_of(*words, *more, "--output", folder, "--checkpoint-every", 5)
    session.before()

    def stop(metrics, batch):
        if metrics["step"] == 6:  # after the checkpoint of step 5: what it logged is cut off, and made again
            raise KeyboardInterrupt
        return after_step(metrics, batch)

    after_step, session._after_step = session._after_step, stop
    with pytest.raises(KeyboardInterrupt):
        session.train()
    session.close()
    return folder, *trained(folder, *words, *more, "--checkpoint-every", 5, "--resume", "auto")


def test_what_watches_changes_nothing(plain_run, watched):
    """Listening draws no random number; the weights are the same bit for bit, the resume included."""
    rows, parameters = plain_run
    _, watched_rows, watched_parameters = watched
    assert [row["step"] for row in watched_rows] == [1, 2, 3, 4, 5, 6]
    own = {"listen_real", "listen_silent", "listen_rows", "seconds"}
    assert [{k: v for k, v in row.items() if k not in own} for row in watched_rows] == [
        {k: v for k, v in row.items() if k not in own} for row in rows
    ]
    assert all(parameter.equal(watched_parameters[name]) for name, parameter in parameters.items())


def test_listening_is_measured_every_so_many_steps_on_a_few_rows(watched):
    _, rows, _ = watched
    assert [row["step"] for row in rows if "listen_real" in row] == [2, 4, 6]
    for row in (row for row in rows if "listen_real" in row):
        assert {row["listen_real"] * 3, row["listen_silent"] * 3} <= {0.0, 1.0, 2.0, 3.0}
        assert row["seconds"]["listen"] > 0 and row["listen_rows"] == 3
    assert all(row["seconds"]["records"] > 0 for row in rows[1:5]) and "kl" in rows[0]


def test_trackers_get_the_run_once_although_it_was_resumed(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, rows, _ = watched
    log = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "audio": 0, "tensors": 0})
    log.Reload()
    assert [event.step for event in log.Scalars("reward_total")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in log.Scalars("kl")] == pytest.approx([row["kl"] for row in rows])
    assert [event.step for event in log.Scalars("eval/sampled/accuracy")] == [0]
    assert [event.step for event in log.Audio("rollouts/0/clip_0")] == [1, 6], "the first step and the last"
    assert len(list((folder / "tensorboard").glob("*/hparams.yml"))) == 1


def test_advice_is_printed_once_listed_at_the_end_and_not_again_after_a_resume(words, tmp_path, capsys):
    """Replies of 12 tokens are cut."""
    more = ["--output", tmp_path / "run", "--checkpoint-every", 5, "--max-steps"]
    trained(tmp_path / "run", *words, *more, 5)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("step 5, completions_hit_the_limit: ") == 1
    _, _, end = printed.partition("advice of this run ")
    assert "step 5 completions_hit_the_limit, docs/troubleshooting.md#completions_hit_the_limit" in end
    trained(tmp_path / "run", *words, *more, 6, "--resume", "auto", "--allow-changed-config", "true")
    printed = " ".join(capsys.readouterr().out.split())
    assert "completions_hit_the_limit: " not in printed and "step 5 completions_hit_the_limit" in printed


def test_a_tracker_that_cannot_start_refuses_the_run_and_gives_the_folder_back(words, tmp_path, monkeypatch):
    from accelerate import tracking

    def start(self):
        raise RuntimeError("no login")

    monkeypatch.setattr(tracking.TensorBoardTracker, "start", start)
    more = ["--output", tmp_path / "run", "--max-steps", 1, "--report-to", "tensorboard"]
    with pytest.raises(ConfigError, match="report_to tensorboard: RuntimeError: no login; log in, work offline"):
        session_of(*words, *more).accept()
    assert not (tmp_path / "run" / "lock.json").exists()
    monkeypatch.undo()
    session = session_of(*words, *more)
    session.accept()
    assert (tmp_path / "run" / tracker_room.IDS).is_file()
    session.close()
    assert re.fullmatch(r"\{\s*\"tensorboard\": \"[0-9a-f]{8}\"\s*\}", (tmp_path / "run" / "trackers.json").read_text())


def test_a_tracker_that_is_not_installed_is_refused_before_a_model_is_loaded(words, tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_room, "package_versions", lambda names: dict.fromkeys(names))
    with pytest.raises(ConfigError, match="report_to wandb: it is not installed: pip install wandb"):
        session_of(*words, "--output", tmp_path / "run", "--report-to", "wandb")
    assert not (tmp_path / "run").exists()


def test_listening_without_sound_to_silence_is_refused(words, tmp_path):
    rows = [{"id": str(i), "audio": None, "question": f"Which {i}?", "choices": ["bell", "dog"], "answer": "dog"}
            for i in range(2)]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match="listen_every 2: no held-out row has a clip to be silenced"):
        session_of(*words, "--output", tmp_path / "run", "--eval-data", tmp_path / "rows.json", "--listen-every", 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # seven steps of full size, for a figure that a busy machine blurs
def test_what_watches_a_step_takes_less_than_two_percent_of_it(tmp_path):
    """CPU seconds of a step, and of all that records it, monitor and tracker included, at the size of the shipped run:
    256 rollouts. Steps without a table of rollouts: with one (each tenth) tensorboard takes 5 to 10 %."""
    pytest.importorskip("tensorboard")
    questions = synth.render_set(tmp_path, seed=7, train=44, validation=11, test=11)
    session = session_of("--config", CONFIG, "--data", questions["train"], "--eval-data", questions["test"],
                         "--evaluate", "false", "--max-steps", 7, "--report-to", "tensorboard",
                         "--output", tmp_path / "run")  # fmt: skip
    times, after_step = [], session._after_step

    def timed(metrics, batch):
        times.append(time.process_time())
        score = after_step(metrics, batch)
        times.append(time.process_time())
        return score

    session._after_step = timed
    session.train()
    session.close()
    steps = [after - before for before, after in zip(times[1::2], times[2::2], strict=False)]  # 2 to 7
    records = [after - before for before, after in zip(times[2::2], times[3::2], strict=True)]
    shares = [record / step for record, step in zip(records, steps, strict=True)][:-1]  # the last has a table
    assert len(shares) == 5 and statistics.median(shares) < 0.02, shares


def test_without_evaluations_before_and_after_those_of_the_steps_are_made_all_the_same(words, tmp_path):
    """On rows that the test set or a share of the data gives; without any, eval_every is refused."""
    more = ["--evaluate", "false", "--max-steps", 2, "--output", tmp_path / "run", "--listen-rows", 2]
    session = session_of(*words, *more, "--eval-every", 2, "--listen-every", 1)
    session.train()
    session.close()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["listen_real" in row for row in rows] == [True, True]
    assert ["eval_accuracy" in row for row in rows] == [False, True] and not (tmp_path / "run" / "before.json").exists()
    alone = [*words[: words.index("--eval-data")], *words[words.index("--eval-data") + 2 :], "--evaluate", "false"]
    with pytest.raises(ConfigError, match="eval_every 2: no row is held out"):
        session_of(*alone, "--output", tmp_path / "other", "--eval-every", 2, "--eval-fraction", 0)
    assert session_of(*alone, "--output", tmp_path / "other", "--limit", 9).held_out == []


def test_what_observers_say_at_the_end_stands_above_the_last_lines(words, tmp_path, monkeypatch):
    session, order = session_of(*words, "--output", tmp_path / "run", "--max-steps", 1), []
    session.accept()
    for observer in session.observers:
        monkeypatch.setattr(observer, "close", lambda result: order.append(result["steps"]))
    count = len(session.observers)
    monkeypatch.setattr("covo_rl.run.session.show_end", lambda *_: order.append("last lines"))
    session.self_check = {}
    session.finish(tmp_path / "run" / "adapter", 1)
    session.close()
    assert order == [1] * count + ["last lines"] and not (tmp_path / "run" / "lock.json").exists()
