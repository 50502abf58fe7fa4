"""Programs of the user's that answer JSON lines: what comes is taken, all else is named and counted."""

import json
import sys
import textwrap
import time

import numpy as np
import pytest

from covo_rl.rewards import RewardError
from covo_rl.rewards.judge import judge_from_spec
from covo_rl.rewards.program import Program, clip_paths, reply_text
from covo_rl.rewards.replies import AnswerError, JudgeError
from covo_rl.types import Clip

#: reads all lines into `rows`; `say(row, **more)` answers one
HEAD = """
import json, os, subprocess, sys, time
rows = [json.loads(line) for line in sys.stdin]
def say(row, **more):
    print(json.dumps({"id": row["id"], "text": row["id"].upper(), **more}), flush=True)
"""
LINES = [{"id": "a"}, {"id": "b"}, {"id": "c"}]


@pytest.fixture
def program(tmp_path):
    def make(body, **limits):
        path = tmp_path / "engine.py"
        path.write_text(HEAD + textwrap.dedent(body))
        return Program(f"{sys.executable} {path}", **{"tries": 1, "seconds": 20, **limits})

    return make


def ask(engine):
    return engine.ask(LINES, reply_text)


def test_answers_may_come_in_any_order(program):
    engine = program("for row in rows[::-1]: say(row)")
    assert ask(engine) == ["A", "B", "C"] and not engine.faults


@pytest.mark.parametrize(
    ("body", "why", "faults"),
    [
        ("say(rows[0]); sys.exit('no memory')", "exit code 1; its last words: no memory", {"ended with an error": 1}),
        ("say(rows[0])", "ended without an answer to it", {}),
        ("say(rows[0]); say({'id': 'z'})", "'z', which was not asked for", {"an unknown id": 1}),
        ("say(rows[0]); print('loading'); print('[1', flush=True)", "'loading' is no JSON", {"no JSON": 2}),
        ("say(rows[0]); say(rows[0] | {'id': 7} if 0 else {'id': 'A'}); print('7')", "was not asked for",
         {"an unknown id": 2}),
        ("say(rows[0]); print('{\"id\": \"b\", \"text\": NaN}')", "NaN is no number of JSON", {"no JSON": 1}),
    ],
)  # fmt: skip
def test_what_does_not_come_is_named_and_counted(program, body, why, faults):
    engine = program(body)
    first, *lost = ask(engine)
    assert first == "A" and all(isinstance(one, AnswerError) and why in str(one) for one in lost), lost
    assert engine.faults == {**faults, "no answer": 2}


def test_an_answer_that_is_none_costs_its_own_row(program):
    engine = program("say(rows[0]); say(rows[1], text=3); say(rows[2])")
    first, second, third = ask(engine)
    assert (first, third) == ("A", "C") and "text is 3, not a string" in str(second)
    assert engine.faults == {"an unusable answer": 1}


def test_of_two_answers_to_one_row_neither_counts(program):
    kept = {}
    engine = program("say(rows[0]); say(rows[1]); say(rows[1], text='other'); say(rows[2])")
    found = engine.ask(LINES, reply_text, lambda name, text: kept.update({name: text}))
    assert found[::2] == ["A", "C"] and "answered it twice" in str(found[1]) and kept == {"a": "A", "b": None, "c": "C"}


def test_one_that_hangs_is_stopped_and_what_came_before_counts(program):
    engine, begun = program("say(rows[0]); time.sleep(60)", seconds=0.5), time.monotonic()
    first, *lost = ask(engine)
    assert first == "A" and all("wrote nothing for" in str(one) for one in lost) and engine.faults["hung"] == 1
    assert time.monotonic() - begun < 10


def test_what_it_leaves_behind_is_ended_with_it(program):
    child = "import time, sys\\nwhile True: print('late', flush=True); time.sleep(.1)"
    engine, begun = program(f'say(rows[0]); subprocess.Popen([sys.executable, "-c", "{child}"])'), time.monotonic()
    first, *lost = ask(engine)
    assert first == "A" and "held its output open" in str(lost[0]) and time.monotonic() - begun < 10
    assert engine.faults["held its output open after its end"] == 1


def test_one_that_babbles_is_stopped(program):
    engine = program("while True: print('x')")
    assert "lines that answer nothing and was stopped" in str(ask(engine)[0]) and engine.faults["babbled"] == 1


def test_one_that_never_reads_and_ends_loses_its_rows_alone(tmp_path):
    path = tmp_path / "deaf.py"
    path.write_text("raise SystemExit(3)")
    engine = Program(f"{sys.executable} {path}", tries=1)
    lines = [{"id": str(i), "prompt": "x" * 1000} for i in range(500)]  # more than a pipe holds
    assert all("exit code 3" in str(one) for one in engine.ask(lines, reply_text))


def test_what_fails_is_tried_once_more(program, tmp_path):
    body = f"""
    mark = {str(tmp_path / "mark")!r}
    if os.path.exists(mark):
        for row in rows: say(row, text=f"second of {{len(rows)}}")
    else:
        open(mark, "w").close(); say(rows[0])
    """
    assert ask(program(body, tries=2)) == ["A", "second of 2", "second of 2"]


def test_a_program_that_is_not_there_is_refused_and_its_files_are_its_version(tmp_path):
    for wrong in ("", "nowhere-at-all x", "'open"):
        with pytest.raises(RewardError, match="command:"):
            Program(wrong)
    path = tmp_path / "engine.py"
    path.write_text("1")
    first = Program(f"{sys.executable} {path}").version
    path.write_text("2")
    assert Program(f"{sys.executable} {path}").version != first


def test_clips_that_are_no_files_are_written_for_it(tmp_path):
    import soundfile

    wave = np.array([0, 0.5, -2.0] * 1000, np.float32)
    with clip_paths() as path:
        file = path(Clip(array=wave, sampling_rate=8000))
        read, rate = soundfile.read(file)
        assert path(Clip(path=str(tmp_path / "x.flac"))) == str(tmp_path / "x.flac")
    assert rate == 8000 and np.allclose(read, wave * 0.999 / 2, atol=1e-4), "turned down, not cut"


def test_a_command_judges(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "judge.py"
    path.write_text(
        HEAD
        + """
open(sys.argv[1], "a").write(str(len(rows)))
for row in rows: say(row, text=f"{row['prompt']} {row['vote']} {row['temperature']}")
"""
    )
    judge = judge_from_spec(f"command:{sys.executable} {path} {tmp_path / 'log'}.txt")
    assert judge.ask(["p", "q", "p"]) == ["p 0 0", "q 0 0", "p 0 0"]
    assert judge.ask(["q", "r"]) == ["q 0 0", "r 0 0"]
    assert (tmp_path / "log.txt").read_text() == "21", "equal prompts once, and never again"
    assert judge.vote(1, temperature=0.5).ask(["p"]) == ["p 1 0.5"], "another vote is another draw"
    path.write_text("raise SystemExit(2)")
    (reply,) = judge.ask(["new"])
    assert isinstance(reply, JudgeError) and "exit code 2" in str(reply)


def test_a_command_judge_that_hears_is_sent_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "judge.py"
    path.write_text(HEAD + "for row in rows: say(row, text=str(sum(map(os.path.getsize, row['paths']))))")
    judge = judge_from_spec(f"command:{sys.executable} {path}", True)
    short, long = (Clip(array=np.ones(count, np.float32) / 2, sampling_rate=8000) for count in (800, 1600))
    missing = Clip(path=str(tmp_path / "nowhere.wav"))
    replies = judge.ask(["p"] * 4, [[short], [long], [short, long], [missing]])
    assert replies[:3] == ["1644", "3244", "4888"], "one prompt about three sounds is three questions"
    assert isinstance(replies[3], JudgeError) and "nowhere.wav" in str(replies[3])
    assert json.loads(json.dumps(replies[:3])) == replies[:3]
