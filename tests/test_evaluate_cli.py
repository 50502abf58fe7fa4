"""`covo-rl eval` as a user runs it: predictions files, wrong inputs, a kill in the middle, comparison."""

import json
import os
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import pytest
from typer.testing import CliRunner

from covo_rl.evaluate.cli import app

FIXTURES = Path(__file__).parent / "fixtures" / "scoring"
PETS = ["dog", "cat", "cow", "hen"]
PATIENCE_S = 240  # starting a process takes 3 s on an idle machine and over a minute on a busy one


def cli(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def write(path, rows):
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def mmau_row(name, answer="dog", choices=PETS, **more):
    return {
        "id": name, "audio_id": f"./audios/{name}.wav", "question": f"Which animal is {name}?", "choices": choices,
        "answer": answer, "task": "sound", "category": "Reasoning", "sub-category": "Animals", "difficulty": "easy",
        **more,
    }  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "key"), [("mmau-test-mini", "model_output"), ("mmar", "answer_prediction"), ("mmsu", "response")]
)
def test_fixture_rows_through_the_command(tmp_path, name, key):
    rows = json.loads((FIXTURES / ("mmsu.json" if name == "mmsu" else "mmau.json")).read_text(encoding="utf-8"))
    data = write(tmp_path / "data.json", [mmau_row(f"r{i}", row[1], row[0]) for i, row in enumerate(rows)])
    predictions = write(tmp_path / "p.jsonl", [{"id": f"r{i}", key: row[2]} for i, row in enumerate(rows)])
    result = cli(
        "--set", name, "--data", data, "--predictions", predictions, "--output", tmp_path / "out", "--no-plots"
    )
    assert result.exit_code == 0, result.output
    verdicts = [row["official_correct"] for row in records(tmp_path / "out")]
    assert verdicts == [row[3] for row in rows]
    official = report(tmp_path / "out")["official"]
    scored = [row[3] for row in rows if row[3] is not None]
    assert (official["n_scored"], official["n_total"]) == (len(scored), len(rows))
    assert official["accuracy"] == pytest.approx(sum(scored) / len(scored))
    assert official["accuracy_all"] == pytest.approx(sum(scored) / len(rows))


@pytest.fixture
def five(tmp_path):
    """Four rows with replies, one without."""
    data = write(tmp_path / "data.json", [mmau_row(f"r{i}") for i in range(5)])
    replies = ["<think>It barks.</think><answer>dog</answer>", "The answer is dog.", "cat", None]
    predictions = write(tmp_path / "p.json", [{"id": f"r{i}", "model_prediction": r} for i, r in enumerate(replies)])
    return data, predictions


def test_report_of_a_predictions_file(tmp_path, five):
    data, predictions = five
    out = tmp_path / "out"
    result = cli("--set", "mmau-test-mini", "--data", data, "--predictions", predictions, "--output", out, "--no-plots")
    assert result.exit_code == 0, result.output
    found = report(out)
    # Replies: r0 right, r1 right for the official rule only, r2 wrong, r3 null and r4 absent are missing.
    assert (found["official"]["accuracy"], found["official"]["n_scored"], found["official"]["n_total"]) == (2 / 3, 3, 5)
    assert found["official"]["accuracy_all"] == 2 / 5
    assert found["official_extracted"]["accuracy"] == 1 / 3
    assert (found["strict"]["accuracy"], found["strict"]["n_scored"], found["strict"]["n_total"]) == (1 / 5, 5, 5)
    assert (found["n_missing"], found["n_unparseable"]) == (2, 2)
    assert len(found["data_sha256"]) == 64
    assert found["breakdown"]["category"]["Reasoning"]["n"] == 5
    assert [r["official_correct"] for r in records(out)] == [True, True, False, None, None]
    assert [r["strict_correct"] for r in records(out)] == [True, False, False, False, False]
    assert "r3, r4" in result.output, "missing rows are named"
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "66.7" in text and "By category" in text and found["data_sha256"] in text


def test_our_own_rows_can_be_scored_again(tmp_path, five):
    data, predictions = five
    arguments = ("--set", "mmau-test-mini", "--data", data, "--no-plots", "--predictions")
    cli(*arguments, predictions, "--output", tmp_path / "a")
    assert cli(*arguments, tmp_path / "a" / "rows.jsonl", "--output", tmp_path / "b").exit_code == 0
    assert report(tmp_path / "a")["strict"] == report(tmp_path / "b")["strict"]
    assert report(tmp_path / "a")["n_missing"] == report(tmp_path / "b")["n_missing"]


def test_all_wrong_inputs_in_one_report(tmp_path):
    rows = [
        mmau_row("twice"),
        mmau_row("twice"),
        mmau_row("badkey1", "fox"),
        mmau_row("badkey2", "owl"),
        mmau_row("fine"),
    ]
    data = write(tmp_path / "data.json", rows)
    predictions = write(tmp_path / "p.json", [{"id": "stranger", "prediction": "dog"}])
    result = cli("--set", "mmau-test-mini", "--data", data, "--predictions", predictions, "--output", tmp_path / "out")
    assert result.exit_code == 2
    for part in ("twice", "badkey1, badkey2", "stranger"):
        assert part in result.output
    assert not (tmp_path / "out").exists(), "nothing was started"


def test_a_few_answers_outside_the_choices_are_named_and_scored(tmp_path):
    rows = [mmau_row(f"r{i}") for i in range(39)] + [mmau_row("odd", "fox")]
    data = write(tmp_path / "data.json", rows)
    predictions = write(tmp_path / "p.json", [{"id": row["id"], "prediction": row["answer"]} for row in rows])
    result = cli("--set", "mmau-test-mini", "--data", data, "--predictions", predictions, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "not among the choices in 1 row: odd" in result.output
    assert "not among the choices in 1 row: odd" in str(report(tmp_path / "out")["problems"])
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"id": "r0", "prediction": "dog"}\n{"id": "r1", "predic', "line 2"),
        ('[{"id": "r0", "prediction": "dog"}, {"id": "r1",', "half-written"),
        ('[{"id": "r0", "prediction": "dog"}, {"id": "r0", "prediction": "cat"}]', "duplicate ids in 1 row: r0"),
        ('[{"prediction": "dog"}]', "no id in 1 row: 1"),
        ('[{"id": "r0", "text": "dog"}]', "none of the keys model_output"),
    ],
)
def test_broken_predictions(tmp_path, content, said):
    data = write(tmp_path / "data.json", [mmau_row("r0"), mmau_row("r1")])
    (tmp_path / "p.json").write_text(content, encoding="utf-8")
    result = cli(
        "--set", "mmau-test-mini", "--data", data, "--predictions", tmp_path / "p.json", "--output", tmp_path / "out"
    )
    assert result.exit_code == 2
    assert said in result.output


def test_missing_and_broken_clips_are_named_before_a_model_is_loaded(tmp_path):
    data = write(tmp_path / "data.json", [mmau_row("r0"), mmau_row("r1"), mmau_row("r2")])
    make_clip(tmp_path / "audios" / "r0.wav", 1_000)
    (tmp_path / "audios" / "r2.wav").write_bytes(b"RIFF half a file")
    result = cli("--set", "mmau-test-mini", "--data", data, "--model", "nowhere", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "missing in 1 row: r1" in result.output
    assert "cannot be read in 1 row: r2" in result.output


def test_key_words_are_scored_as_the_file_has_them(tmp_path):
    """The official rule compares with the key's text, also where training would read a letter as an option."""
    rows = [mmau_row("letter", "B", ["B flat", "B", "C"]), mmau_row("empty", "", ["", "dog"])]
    del rows[0]["audio_id"]
    data = write(tmp_path / "data.json", rows)
    predictions = write(tmp_path / "p.json", [{"id": "letter", "prediction": "B"}, {"id": "empty", "prediction": ""}])
    result = cli(
        "--set", "mmar", "--data", data, "--predictions", predictions, "--output", tmp_path / "out", "--no-plots"
    )
    assert result.exit_code == 0, result.output
    assert [r["official_correct"] for r in records(tmp_path / "out")] == [True, False]


def test_rows_that_are_no_questions_are_all_named(tmp_path):
    rows = [mmau_row("r0"), {"id": "r1", "question": "?"}, {"question": "?", "choices": []}, 7]
    data = write(tmp_path / "data.json", rows)
    predictions = write(tmp_path / "p.json", [{"id": "r0", "prediction": "dog"}])
    result = cli("--set", "mmsu", "--data", data, "--predictions", predictions, "--output", tmp_path / "out")
    assert result.exit_code == 2
    for part in ("row r1 has no choices", "row 3 has no id", "row 4 is int"):
        assert part in result.output


def test_mmsu_options_and_a_manifest_with_its_own_names(tmp_path):
    row = {"id": 1, "audio": "a.wav", "task_name": "tone", "question": "Which?", "choice_a": "rise", "choice_b": "fall",
           "choice_c": None, "choice_d": None, "answer_gt": "fall", "category": "Perception"}  # fmt: skip
    data = write(tmp_path / "mmsu.jsonl", [row])
    predictions = write(tmp_path / "p.jsonl", [{"id": 1, "response": "B"}])
    cli("--set", "mmsu", "--data", data, "--predictions", predictions, "--output", tmp_path / "a", "--no-plots")
    assert records(tmp_path / "a")[0]["official_correct"] is True
    assert report(tmp_path / "a")["breakdown"]["category"]["Perception"]["n"] == 1
    manifest = write(tmp_path / "mine.json", [])
    fields = {"id": "nr", "question": "ask", "choices": "options", "answer": "key"}
    manifest.write_text(json.dumps({"name": "mine", "fields": fields, "breakdown": ["room"]}))
    data = write(
        tmp_path / "mine-data.json",
        [{"nr": 5, "ask": "Which?", "options": ["rise", "fall"], "key": "rise", "room": "3"}],
    )
    predictions = write(tmp_path / "p2.json", [{"id": "5", "prediction": "it will rise"}])
    result = cli(
        "--set", manifest, "--data", data, "--predictions", predictions, "--output", tmp_path / "b", "--no-plots"
    )
    assert result.exit_code == 0, result.output
    assert report(tmp_path / "b")["official"]["accuracy"] == 1.0
    assert report(tmp_path / "b")["breakdown"]["room"]["3"]["n"] == 1


def test_options_that_make_no_sense_are_all_told():
    result = cli("--num-generations", "4")
    assert result.exit_code == 2
    for part in ("--set", "--output", "--model", "--sample"):
        assert part in result.output


def test_unknown_set_lists_those_that_exist(tmp_path):
    result = cli("--set", "mmlu", "--predictions", "p", "--output", tmp_path / "o")
    assert result.exit_code == 2
    assert "mmau-test-mini, mmau-test, mmar, mmsu, builtin" in result.output


def test_submission_of_the_test_split(tmp_path):
    rows = [mmau_row(f"r{i}", "") for i in range(3)]
    data = write(tmp_path / "mmau-test.json", rows)
    replies = [
        {"id": "r0", "model_output": "<think>Bark.</think><answer>dog</answer>"},
        {"id": "r1", "model_output": "cat"},
    ]
    predictions = write(tmp_path / "p.json", replies)
    result = cli(
        "--set", "mmau-test", "--data", data, "--predictions", predictions, "--output", tmp_path / "out", "--no-plots"
    )
    assert result.exit_code == 0, result.output
    submitted = json.loads((tmp_path / "out" / "submission.json").read_text(encoding="utf-8"))
    assert [(row["id"], row["model_output"], row["model_prediction"]) for row in submitted] == [
        ("r0", "dog", "dog"), ("r1", "cat", "cat"), ("r2", "", ""),
    ]  # fmt: skip
    assert submitted[0]["question"] == rows[0]["question"]
    assert report(tmp_path / "out")["official"]["accuracy"] is None


def test_compare_two_runs(tmp_path):
    rows = [mmau_row(f"r{i}") for i in range(20)]
    data = write(tmp_path / "data.json", rows)
    for name, right in (("a", 8), ("b", 16)):
        replies = [
            {"id": f"r{i}", "prediction": f"<think>Hm.</think><answer>{'dog' if i < right else 'cat'}</answer>"}
            for i in range(20)
        ]
        write(tmp_path / f"{name}.json", replies)
        cli(
            "--set",
            "mmau-test-mini",
            "--data",
            data,
            "--predictions",
            tmp_path / f"{name}.json",
            "--output",
            tmp_path / name,
            "--no-plots",
        )
    result = cli("compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "comparison.json")
    assert result.exit_code == 0, result.output
    strict = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["strict"]
    assert (strict["only_a"], strict["only_b"], strict["n"]) == (0, 8, 20)
    assert strict["mean"] == pytest.approx(0.4)
    assert strict["p_value"] == pytest.approx(2 / 2**8)
    assert "+40.0" in result.output
    assert cli("compare", tmp_path / "a", tmp_path / "nowhere").exit_code == 2


def test_compare_refuses_another_key(tmp_path):
    for name, answer in (("a", "dog"), ("b", "cat")):
        data = write(tmp_path / f"data-{name}.json", [mmau_row("r0", answer)])
        predictions = write(tmp_path / "p.json", [{"id": "r0", "prediction": "dog"}])
        cli(
            "--set",
            "mmau-test-mini",
            "--data",
            data,
            "--predictions",
            predictions,
            "--output",
            tmp_path / name,
            "--no-plots",
        )
    result = cli("compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2
    assert "answer keys differ" in result.output


# -- a model that answers from a file's name, in a process of its own ------------------------------------------------

FAKE = """
import sys, time
import covo_rl.evaluate.runner as runner
from covo_rl.evaluate.cli import app
from covo_rl.evaluate.records import group_from_text

class Store:
    def key(self, clip): return clip.path
    def waveform(self, key):
        import numpy as np
        return np.zeros(80, dtype=np.float32), 8000

class Fake:
    clips = Store()
    def __init__(self, log, pause=0.0):
        self.log, self.pause = log, pause
    def answer(self, examples, *, greedy, num_generations, seed):
        time.sleep(self.pause)
        with open(self.log, "a") as log:
            log.writelines(e.id + "\\n" for e in examples)
        said = [e.choices[(seed + len(e.id) + int(e.id[1:])) % 4] for e in examples]
        texts = [f"<think>Heard {a}.</think><answer>{a}</answer>" for a in said]
        return [group_from_text(e, [text]) for e, text in zip(examples, texts)]
"""
FAKE_PROCESS = """
runner.load_answerer = lambda *args, **options: Fake(sys.argv[1], float(sys.argv[2]))
app(sys.argv[3:])
"""


def make_clip(path, samples):
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0\0" * samples)


@pytest.fixture
def two_hundred(tmp_path):
    for i in range(200):
        make_clip(tmp_path / "audios" / f"r{i}.wav", 80 + 7 * (i % 50))
    return write(tmp_path / "data.json", [mmau_row(f"r{i}", PETS[i % 4]) for i in range(200)])


def fake_words(data, out, *words):
    return ["--set", "mmau-test-mini", "--data", data, "--model", "builtin:tiny", "--output", out, "--batch-size", 8,
            "--no-plots", *words]  # fmt: skip


def start(data, out, log, *words, pause=0.0, env=None):
    command = [
        sys.executable,
        "-c",
        FAKE + FAKE_PROCESS,
        str(log),
        str(pause),
        *map(str, fake_words(data, out, *words)),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(env or {})})


@pytest.fixture
def answered_here(monkeypatch):
    """(rows, output folder, log, more words): what `start` does, in this process."""
    names = {}
    exec(FAKE, names)

    def run(data, out, log, *words):
        monkeypatch.setattr(names["runner"], "load_answerer", lambda *args, **options: names["Fake"](log))
        result = cli(*fake_words(data, out, *words))
        assert result.exit_code == 0, result.output

    return run


def finish(process):
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err.decode()
    return out.decode()


def test_killed_and_restarted_gives_the_same_report(tmp_path, two_hundred, answered_here):
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    answered_here(two_hundred, whole, tmp_path / "log-whole")
    process = start(two_hundred, cut, log, pause=0.03)
    limit = time.monotonic() + PATIENCE_S
    while not (cut / "rows.jsonl").is_file() or (cut / "rows.jsonl").read_bytes().count(b"\n") < 64:
        assert process.poll() is None and time.monotonic() < limit, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (cut / "report.json").exists()
    kept = (cut / "rows.jsonl").read_bytes()
    finished = [json.loads(line)["id"] for line in kept.split(b"\n")[:-1]]
    (cut / "rows.jsonl").write_bytes(kept + b'{"id": "r0", "official_corr')
    answered = log.read_text().split()
    finish(start(two_hundred, cut, log))
    again = log.read_text().split()[len(answered) :]
    assert 64 <= len(finished) < 200
    assert not set(again) & set(finished), "finished rows are not repeated"
    assert len(finished) + len(again) == 200
    for name in ("report.json", "rows.jsonl", "report.md"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    answered_here(two_hundred, cut, log)
    assert len(log.read_text().split()) == len(answered) + len(again), "a finished evaluation answers nothing again"


def test_listening_figures_and_a_folder_that_refuses_other_settings(tmp_path, two_hundred, answered_here):
    out, log = tmp_path / "out", tmp_path / "log"
    answered_here(two_hundred, out, log, "--limit", 16, "--listen")
    audio = report(out)["audio"]
    conditions = {"real", "silent", "swapped", "none"}
    assert set(audio) == conditions | {"real_minus_silent", "real_minus_swapped", "real_minus_none"}
    assert all(audio[name]["n_scored"] == 16 for name in conditions)
    assert "What the audio contributes" in (out / "report.md").read_text(encoding="utf-8")
    result = cli(
        "--set", "mmau-test-mini", "--data", two_hundred, "--model", "builtin:tiny", "--output", out, "--limit", 24
    )
    assert result.exit_code == 2
    assert "limit: 16 there, 24 now" in result.output


# -- one owner, one setting ----------------------------------------------------------------------------------------


def everything(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def scored(out, data, predictions, *more):
    return cli(
        "--set", "mmau-test-mini", "--data", data, "--predictions", predictions, "--output", out, "--no-plots", *more
    )


def test_other_predictions_do_not_replace_a_report_unasked(tmp_path, five):
    """finding 09"""
    data, predictions = five
    out = tmp_path / "out"
    assert scored(out, data, predictions).exit_code == 0
    assert scored(out, data, predictions).exit_code == 0, "the same again is no other evaluation"
    other = write(tmp_path / "other.json", [{"id": "r0", "prediction": "cow"}])
    (out / "notes.txt").write_text("mine")
    before = everything(out)
    for words in ((data, other), (data, predictions, "--rewards", "none"), (data, predictions, "--limit", 2)):
        done = scored(out, *words)
        assert (
            done.exit_code == 2 and "holds another evaluation (choose another --output, or --overwrite)" in done.output
        )
        assert everything(out) == before
    assert scored(out, data, other, "--overwrite").exit_code == 0
    assert report(out)["strict"]["accuracy"] == 0.0 and (out / "notes.txt").read_text() == "mine"
    assert scored(out, data, out / "rows.jsonl", "--overwrite").exit_code == 2, "it would delete what it reads"


@pytest.mark.parametrize("name", ["report.json", "rows.silent.jsonl", "profile.json"])
def test_results_that_nobody_claims_are_not_replaced(name, tmp_path, five):
    """finding 09"""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    done = scored(out, *five)
    assert done.exit_code == 2 and f"holds {name} of unknown origin" in done.output
    assert list(everything(out)) == [name]


def test_only_the_first_rank_scores_predictions(tmp_path, five, monkeypatch):
    """finding 07: every rank wrote the same folder."""
    from covo_rl.evaluate import evaluation as command
    from covo_rl.train.ranks import Ranks

    monkeypatch.setattr(command, "joined_ranks", lambda: Ranks(1, 2))
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value, value])
    assert scored(tmp_path / "out", *five).exit_code == 0
    assert not (tmp_path / "out").exists()


def test_an_evaluation_in_use_is_refused_and_one_that_cannot_load_its_model_deletes_nothing(
    tmp_path, five, monkeypatch
):
    """finding 07, finding 08"""
    data, predictions = five
    out = tmp_path / "out"
    scored(out, data, predictions)
    before = everything(out)
    done = cli("--set", "builtin", "--model", tmp_path / "nowhere", "--output", out, "--overwrite", "--limit", 1)
    assert done.exit_code == 2 and "nowhere" in done.output
    assert everything(out) == before
    monkeypatch.setattr("covo_rl.records.lock.FolderLock.hold", lambda self: f"{self.folder} is in use by process 7")
    done = scored(out, data, predictions)
    assert done.exit_code == 2 and "in use by process 7" in done.output
    assert everything(out) == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("report.json", '{"set": "mm', "report.json cannot be read"),
        ("report.json", "null", "option: value, found nothing"),
        ("report.json", "[1]", "expected a mapping"),
        ("rows.jsonl", "", "0 rows, its report is over 5"),
        ("rows.jsonl", '{"id": "r0"\n{"id": "r1"}\n', "rows.jsonl, line 1"),
        ("run.json", "{", "run.json cannot be read"),
    ],
)
def test_a_damaged_evaluation_is_named_by_whoever_reads_it(name, content, said, tmp_path, five):
    """finding 10"""
    a, b = tmp_path / "a", tmp_path / "b"
    for out in (a, b):
        assert scored(out, *five).exit_code == 0
    (b / name).write_text(content)
    done = scored(b, *five) if name == "run.json" else cli("compare", a, b)
    assert done.exit_code == 2 and said in done.output
    assert cli("compare", a, a).exit_code == 0


def test_a_cut_last_line_is_left_out_of_scoring_and_said(tmp_path):
    """finding 10: the rollouts of a run that was killed."""
    from covo_rl.rewards.cli import app as rewards

    row = {"completion": "<think>x</think><answer>dog</answer>", "question": "?", "choices": PETS, "answer": "dog"}
    source, target = tmp_path / "rollouts.jsonl", tmp_path / "scored.jsonl"
    words = ["score", "--rewards", "accuracy", "--input", str(source), "--output", str(target)]
    source.write_text(f'{json.dumps(row)}\n{{"completion": "<thi')
    done = CliRunner().invoke(rewards, words)
    assert done.exit_code == 0 and "left out, half written" in done.output and "line 2" in done.output
    assert [json.loads(line)["reward_total"] for line in target.read_text().splitlines()] == [1.0]
    source.write_text(f'{{"completion": "<thi\n{json.dumps(row)}\n')
    done = CliRunner().invoke(rewards, words)
    assert done.exit_code != 0 and "line 1" in done.output


def test_a_clip_that_would_be_read_in_part_is_named_before_a_model_is_loaded(tmp_path):
    """finding 34: the evaluation asked headers alone, which a cut file still has."""
    data = write(tmp_path / "data.json", [mmau_row("r0"), mmau_row("r1")])
    for name in ("r0", "r1"):
        make_clip(tmp_path / "audios" / f"{name}.wav", 8_000)
    whole = (tmp_path / "audios" / "r1.wav").read_bytes()
    (tmp_path / "audios" / "r1.wav").write_bytes(whole[: len(whole) // 2])
    result = cli("--set", "mmau-test-mini", "--data", data, "--model", "nowhere", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot be read in 1 row: r1" in result.output and "truncated" in result.output
