"""`eval_set`: sets that a run measures with the policy as it is. They see it, and change nothing about it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from speech_layouts import write_layout

from covo_rl import synth
from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, parse_options
from covo_rl.data import load_examples
from covo_rl.data.files import read_record
from covo_rl.evaluate.evaluation import run_request
from covo_rl.evaluate.in_training import InTrainingSet, read_in_training_sets
from covo_rl.evaluate.runner import Request
from covo_rl.export.adapter import save_policy
from covo_rl.run.observers import Evaluator
from covo_rl.run.session import Session

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Rendered questions, and two of their clips as a set of recognition, of which one is called `kitchen`."""
    files = synth.render_set(tmp_path_factory.mktemp("questions"), seed=7, train=22, validation=11, test=22)
    clips = [row.clips[0].path for row in load_examples(str(files["test"])) if row.clips][:2]
    rows = [{"id": f"r{i}", "audio": clip, "text": "two beeps", "language": "en", "subset": name}
            for i, (clip, name) in enumerate(zip(clips, ("kitchen", "hall"), strict=True))]  # fmt: skip
    files["spoken"] = files["train"].parent / "spoken.jsonl"
    files["spoken"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture(scope="module")
def words(questions):
    """Dropout draws from the generator that an evaluation must not touch."""
    return ["--config", CONFIG, "--data", questions["train"], "--eval-data", questions["test"], "--prompts-per-step", 2,
            "--num-generations", 2, "--limit", 4, "--eval-limit", 2, "--check-rewards", "false", "--evaluate", "false",
            "--lora-dropout", 0.1, "--max-steps", 2, "--checkpoint-every", 1, "--eval-every", 1]  # fmt: skip


@pytest.fixture(scope="module")
def sets(questions):
    return ["--eval-set", "builtin,limit=6", "--eval-set", f"asr={questions['spoken']},allow_outside_audio=true"]


def session_of(*words):
    return Session(parse_options([str(word) for word in words]))


def trained(folder, *words):
    """The session after training, the lines of metrics.jsonl, and the parameters that trained."""
    session = session_of(*words, "--output", folder)
    trainer = session.train()
    session.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return session, rows, {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def watched(words, sets, tmp_path_factory):
    """A run with two sets that is killed while the second is measured at step 2, and resumed."""
    folder, figures, calls = tmp_path_factory.mktemp("watched") / "run", InTrainingSet.figures, []

    def killed(self, *arguments):
        calls.append(self.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return figures(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InTrainingSet, "figures", killed)
        session = session_of(*words, *sets, "--output", folder)
        with pytest.raises(KeyboardInterrupt):
            session.train()
        session.close()
    assert calls == ["builtin", "asr"] * 2
    return trained(folder, *words, *sets, "--resume", "auto")


def test_sets_change_nothing_about_the_training_and_a_killed_evaluation_is_made_again(words, watched, tmp_path):
    _, rows, parameters = trained(tmp_path / "run", *words)
    _, watched_rows, watched_parameters = watched
    assert all(parameter.equal(watched_parameters[name]) for name, parameter in parameters.items())
    assert [{k: v for k, v in row.items() if not k.startswith("eval/") and k != "seconds"} for row in watched_rows] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows
    ]
    assert len(rows) == 2 and all("eval_accuracy" in row and row["seconds"]["eval"] > 0 for row in watched_rows)
    keys = {"accuracy", "official", "official_extracted", "n", "missing", "unreadable"}
    spoken = {f"{part}/{key}" for part in ("kitchen", "hall") for key in ("score", "n", "missing")}
    expected = {f"eval/builtin/{key}" for key in keys} | {f"eval/asr/{key}" for key in {*spoken, "n", "missing"}}
    assert all({key for key in row if key.startswith("eval/")} == expected for row in watched_rows)
    assert watched_rows[1]["eval/builtin/n"] == 6 and watched_rows[1]["eval/asr/n"] == 2
    assert watched_rows[1]["eval/builtin/missing"] == watched_rows[1]["eval/asr/missing"] == 0


def test_the_figures_are_those_of_the_command_on_the_saved_policy(watched, questions, tmp_path):
    session, rows, _ = watched
    adapter = save_policy(session.trainable, tmp_path / "adapter", base="builtin:tiny")
    shared = {"model": "builtin:tiny", "adapter": str(adapter), "max_completion_length": 48, "batch_size": 64,
              "plots": False}  # fmt: skip
    wording = {"instruction": "", "choice_style": "inline"}
    run_request(Request("builtin", limit=6, rewards="none", output=tmp_path / "b", **wording, **shared), quiet=True)
    report = read_record(tmp_path / "b" / "report.json")
    ours = {name: rows[1][f"eval/builtin/{name}"] for name in ("accuracy", "official", "official_extracted")}
    assert ours == {"accuracy": report["accuracy"], **{name: report[name]["accuracy"] for name in [*ours][1:]}}
    assert rows[1]["eval/builtin/unreadable"] == report["n_unparseable"] and 0 < report["accuracy"] < 1

    spoken = Request("asr", data=questions["spoken"], allow_outside_audio=True, output=tmp_path / "a", **shared)
    run_request(spoken, quiet=True)
    blocks = read_record(tmp_path / "a" / "report.json")["subsets"]
    assert {n: rows[1][f"eval/asr/{n}/score"] for n in blocks} == {n: block["score"] for n, block in blocks.items()}


def test_without_held_out_rows_sets_are_measured_alone_and_choose_no_best_checkpoint():
    def figures(*arguments):
        return {"eval/mmar/accuracy": 0.4}

    options = parse_options(["--eval-set", "mmar=a.jsonl", "--eval-every", "2"])
    session = SimpleNamespace(options=options, held_out=[], eval_sets=[SimpleNamespace(figures=figures)], terms=(),
                              policy=None, clips=None, ranks=None, current_engine=lambda: None)  # fmt: skip
    rows = [{"step": step, "seconds": {}} for step in (1, 2)]
    for row in rows:
        Evaluator(session).measure(row)  # type: ignore[arg-type]
    assert [row.get("eval/mmar/accuracy") for row in rows] == [None, 0.4] and "eval_accuracy" not in rows[1]
    options.train.keep_best = True
    with pytest.raises(ConfigError, match="keep_best, which an eval_set has no part in: no row is held out"):
        Evaluator(session)  # type: ignore[arg-type]


# -- entries -----------------------------------------------------------------------------------------------------------


def read(*entries, train=(), **changes):
    options = parse_options([*(f"--eval-set={entry}" for entry in entries), "--eval-every", "1"])
    for name, value in changes.items():
        setattr(options.data, name, value)
    return read_in_training_sets(options, 30.0, train, ClipStore())


def test_a_flag_may_come_several_times_and_replaces_the_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("eval_set: [mmar=a.jsonl, builtin]\neval_every: 5\n")
    assert parse_options(["--config", str(file)]).eval.eval_set == ["mmar=a.jsonl", "builtin"]
    several = ["--eval-set", "builtin", "--eval-set", "own=a.json", "mmsu=b.json"]
    assert parse_options(["--config", str(file), *several]).eval.eval_set == ["builtin", "own=a.json", "mmsu=b.json"]
    with pytest.raises(ConfigError, match="eval_set builtin: without eval_every"):
        parse_options(["--eval-set", "builtin"])


def test_all_that_is_wrong_with_all_sets_is_said_at_once(questions, tmp_path):
    spoken = f"{questions['spoken']},allow_outside_audio=true"
    _, problems = read(
        "builtim", "mmar", "mmsu=nowhere.jsonl", "own=a.json,limt=3", "builtin,limit=0", "duplex", "mmau-test=a.json",
        f"asr={spoken},subset=garden", f"own={questions['test']},judge=command:x", "uro-bench=nowhere",
    )  # fmt: skip
    said = "\n".join(problems)
    for part in (
        "eval_set builtim: no such set; did you mean builtin?", "eval_set mmar: it needs data: write mmar=DATA",
        "eval_set mmsu: --data nowhere.jsonl: no such file", "unknown option 'limt'; did you mean limit?",
        "eval_set builtin: limit 0: must be at least 1", "eval_set duplex: ", "asks a live session",
        "has answers that only its host knows", "eval_set asr: ", "garden", "--judge: only for a set of speech",
        "eval_set uro-bench: --data nowhere: no such file or folder", "eval_set own: it is there twice",
    ):  # fmt: skip
        assert part in said, (part, said)


def test_two_sets_of_one_name_and_rows_that_train_are_refused(questions, tmp_path):
    manifest = tmp_path / "mine.yaml"
    manifest.write_text("name: builtin\n")
    _, problems = read(
        "builtin,limit=2", f"{manifest}={questions['test']}", train=load_examples(str(questions["test"]))
    )
    assert problems[-1] == "eval_set builtin: it is there twice; one run has one set of a name"
    assert len(problems) == 22 + 1 and all(text.startswith(f"eval_set {manifest}: ") for text in problems[:-1])
    found, problems = read(f"own={questions['test']}", train=load_examples(str(questions["test"])), allow_overlap=True)
    assert not problems and [len(one.inputs.examples) for one in found] == [22]


def test_a_set_of_speech_needs_its_judge_and_no_sound(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))
    data = write_layout("uro-bench", tmp_path / "data")
    _, problems = read(f"uro-bench={data},subset=GaokaoEval,subset=SRT-en")
    assert [text.partition(": ")[2][:37] for text in problems] == [
        "SRT-en: scored by sound, which a run ", "GaokaoEval: no judge; add judge=SPEC:"
    ]  # fmt: skip
    judge = tmp_path / "judge.jsonl"
    judge.write_text(json.dumps({"id": "GaokaoEval/g0", "text": "Yes"}) + "\n")
    found, problems = read(f"uro-bench={data},subset=GaokaoEval,judge=file:{judge}")
    assert not problems and found[0].name == "uro-bench" and found[0].speech is not None
    _, problems = read(f"vstyle={write_layout('vstyle', tmp_path / 'style')}")
    assert len(problems) == 1 and "scored by sound" in problems[0]
