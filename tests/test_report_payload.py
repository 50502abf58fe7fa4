"""What a report holds of a run folder: all that is there, verified, within a budget; and what is not there, said."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import report_contract
import soundfile
import yaml

from covo_rl.audio import content_key
from covo_rl.config import Options
from covo_rl.records.folder import Run
from covo_rl.records.lock import FolderLock
from covo_rl.records.rules import RULES
from covo_rl.records.sounds import KeptSounds
from covo_rl.records.steps import StepRecord
from covo_rl.run.observers import Recorder
from covo_rl.run.report import overview, sound
from covo_rl.run.report.page import render
from covo_rl.run.report.payload import report_payload
from covo_rl.run.report.pictures import mel_picture, peaks, png
from covo_rl.run.report.sound import relative_url
from covo_rl.run.report.values import MAX_TEXT
from covo_rl.types import Clip, Example

RATE = 8_000
TEXT = "<think>It rings.</think><answer>bell</answer>"
WRONG = "<think>It barks.</think><answer>dog</answer>"


def tone(hertz=440.0, seconds=0.5, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wav(path, hertz=440.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(hertz), RATE)
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def rollout_row(group=0, rollout=0, completion=TEXT, **changes):
    right = "bell</answer>" in completion
    scores = {"accuracy": float(right), "format": 1.0, "consistency": 1.0, "thinking": 0.6}
    row = {
        "id": f"row{group}", "clips": [], "clip_keys": [], "question": "What?", "choices": ["bell", "dog"],
        "answer": "bell", "group": group, "rollout": rollout, "completion": completion, "parsed_answer": "bell",
        "stop_reason": "stop", "problems": [], "rewards": scores, "missing": {}, "reward_total": sum(scores.values()),
        "advantage": 1.0 if right else -1.0, "length": 4, "mean_logp": -0.25, "task": "sound",
        "token_logps": [[7, len(completion) - 7, 0], [0, -120, -3]],
    }  # fmt: skip
    return {**row, **changes}


def logged(folder, step, rows):
    path = folder / "rollouts" / f"step_{step:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def summary(right, n, **more):
    return {"n": n, "accuracy": right / n, "ci95": [0.2, 0.8], "reward_accuracy": right / n, **more}


def made_run(folder, steps=3, groups=2, rows=None, **config):
    """A finished run of `steps` steps, a right and a wrong rollout in each group."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": "builtin:tiny", "num_generations": 2, **config}))
    (folder / "environment.json").write_text(json.dumps({"covo_rl": "0.1.0", "sha256": {"data": "aa"}}))
    breakdown = {"task": {"sound": {"n": 3, "strict": summary(1, 3)}}}
    before = {"greedy": summary(1, 4, breakdown=breakdown), "sampled": summary(1, 4)}
    details = {"before": before, "after": before, "silent": {"sampled": summary(1, 4)}, "swapped": {}}
    (folder / "result.json").write_text(json.dumps({"steps": steps, "details": details}))
    metrics = [{"step": step, "reward_total": float(step), "seconds": {"step": 1.0}} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    for step in range(1, steps + 1):
        logged(folder, step, rows or [rollout_row(p, g, (TEXT, WRONG)[g]) for p in range(groups) for g in range(2)])
    return folder


def payload_of(*folders, **options):
    payload = report_payload(folders, **options)
    assert report_contract.problems(payload) == []
    return payload


def notes_of(payload):
    return "\n".join([*payload["notes"], *(note for run in payload["runs"] for note in run["notes"])])


# -- what is there -----------------------------------------------------------------------------------------------


def test_a_finished_run_is_there_as_it_was_written(tmp_path):
    payload = payload_of(made_run(tmp_path / "run"))
    run = payload["runs"][0]
    assert run["name"] == "run" and run["config"]["model"] == "builtin:tiny" and "details" not in run["result"]
    assert [row["reward_total"] for row in run["metrics"]] == [1.0, 2.0, 3.0] and notes_of(payload) == ""
    assert [block["name"] for block in run["evaluations"]] == [
        "before, greedy", "before, sampled", "after, greedy", "after, sampled", "after, sampled, silent audio",
    ]  # fmt: skip
    share = {"n": 3, "accuracy": 1 / 3, "ci95": [0.2, 0.8]}
    assert run["evaluations"][0]["breakdown"] == [{"column": "task", "value": "sound", **share}]
    assert run["evaluations"][0]["rewards"] == {"accuracy": 0.25}
    assert payload["counts"] | {"bytes": 0} == {
        "rollouts": 12, "groups": 6, "steps": 3, "steps_left_out": 0, "sounds_embedded": 0, "sounds_linked": 0,
        "sounds_missing": 0, "tokens_left_out": 0, "bytes": 0,
    }  # fmt: skip
    group = payload["groups"][0]
    right, wrong = group["rollouts"]
    assert (group["step"], group["group"], group["id"], group["columns"]) == (1, 0, "row0", {"task": "sound"})
    assert (right["think"], right["answer"], right["total"], right["advantage"]) == ("It rings.", "bell", 3.6, 1.0)
    assert right["tokens"] == [["<think>", TEXT[7:], ""], [0, -120, -3]]
    assert wrong["flags"] == ["wrong_high_thinking"]  # all thinking is 0.6: its upper quarter begins there


def test_reading_a_report_needs_no_torch(tmp_path):
    folder = made_run(tmp_path / "run")
    code = f"import sys; from covo_rl.run.report.payload import report_payload as r; r([{str(folder)!r}])"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


def test_reasons_stand_beside_their_component_and_facts_beside_the_row(tmp_path):
    first = rollout_row(
        missing={"consistency": "failed: judge: timed out"}, thinking_unmet="soundness", format_problems="",
        accuracy_rationale="it says bell", mine=1, facts={"source": "bell"}, **{"row/length": "long"},
    )  # fmt: skip
    second = {**first, "rollout": 1, "mine": 2, "thinking_unmet": ""}
    long = {**rollout_row(1), "evidence": "x" * 501, "reason": "of no component"}
    payload = payload_of(made_run(tmp_path / "run", 1, rows=[first, second, long]))
    group, other = payload["groups"]
    assert group["rollouts"][0]["reasons"] == {
        "consistency": "not graded: failed: judge: timed out", "thinking": "not met: soundness",
        "accuracy": "it says bell",
    }  # fmt: skip
    assert group["columns"] == {"task": "sound", "facts": "{source: bell}", "length": "long"}  # `mine` is of rollouts
    assert "thinking" not in group["rollouts"][1]["reasons"]
    assert other["columns"] == {"task": "sound", "reason": "of no component"}
    assert "1 groups have a column evidence of over 500 characters" in notes_of(payload)


def test_advice_of_the_monitor_is_in_the_report(tmp_path):
    folder = made_run(tmp_path / "run", 30)
    rows = [{"step": step, "reward_total": 1.0, "zero_variance_groups": 1.0} for step in range(1, 31)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = payload_of(folder)["runs"][0]["advice"]
    assert [piece["rule"] for piece in pieces] != []
    assert all(piece["help"].startswith("Looks at `zero_variance_groups`") for piece in pieces)


def test_the_docs_have_a_section_for_each_rule_and_no_other_page_is_quoted(tmp_path, monkeypatch):
    """From the checkout or the bundled copy; a page of that name where the command runs is somebody else's."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "troubleshooting.md").write_text("### `kl_runs_away`\n\nmine\n")
    monkeypatch.chdir(tmp_path)
    sections = overview.sections.__wrapped__("troubleshooting.md")
    assert {rule.name for rule in RULES} <= sections.keys() and "mine" not in sections["kl_runs_away"]
    assert not any("](" in text or "\n#" in text for text in sections.values())
    monkeypatch.setattr(overview, "folders", lambda kind: [("working directory", tmp_path / kind)])
    assert overview.sections.__wrapped__("troubleshooting.md") == {}


# -- flags -------------------------------------------------------------------------------------------------------


def test_flags_say_what_they_say(tmp_path):
    def scored(accuracy, consistency, thinking, **changes):
        scores = {"accuracy": accuracy, "consistency": consistency, "thinking": thinking}
        return rollout_row(completion=changes.pop("text", TEXT), rewards=scores, **changes)

    rows = [
        scored(1.0, 0.0, 0.9, text="one", length=9),
        scored(0.0, 1.0, 1.0, text="two", rollout=1),
        scored(0.0, None, 0.2, text="two", rollout=2, stop_reason="length"),
        scored(1.0, 1.0, 0.1, text="four", rollout=3),
        *[scored(1.0, 1.0, 0.5, text=f"{g}", group=1, rollout=g, advantage=0.0) for g in range(4)],
    ]
    payload = payload_of(made_run(tmp_path / "run", 1, rows=rows))
    first, second = payload["groups"]
    assert [rollout["flags"] for rollout in first["rollouts"]] == [
        ["right_broken_reasoning", "longest"],
        ["copy", "wrong_high_thinking"],
        ["truncated", "copy", "consistency_missing"],
        ["right_broken_reasoning"],
    ]
    assert first["flags"] == [] and second["flags"] == ["no_variance"]


def test_a_component_with_arguments_is_the_component(tmp_path):
    rows = [rollout_row(rewards={"accuracy(strict=True)": 1.0, "format(pattern='x')": 0.0})]
    assert payload_of(made_run(tmp_path / "run", 1, rows=rows))["groups"][0]["rollouts"][0]["flags"] == [
        "right_broken_reasoning", "longest",
    ]  # fmt: skip


def test_the_biggest_change_is_of_one_row_between_two_appearances(tmp_path):
    folder = made_run(tmp_path / "run", 1)
    for step, means in {1: (1.0, 2.0), 4: (1.5, 2.0), 7: (3.5, 2.1)}.items():
        logged(folder, step, [rollout_row(p, 0, reward_total=mean) for p, mean in enumerate(means)])
    flagged = [(g["step"], g["id"]) for g in payload_of(folder)["groups"] if "biggest_change" in g["flags"]]
    assert flagged == [(4, "row0"), (7, "row0")]
    logged(folder, 7, [rollout_row(0, 0, reward_total=1.6), rollout_row(1, 0, id="row0", reward_total=4.0)])
    groups = [g for g in payload_of(folder)["groups"] if "biggest_change" in g["flags"]]
    assert [(g["step"], g["id"]) for g in groups] == [(1, "row0"), (4, "row0")]  # not within step 7


# -- what is not there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("result.json", None, "the run has no result yet: it was stopped, or is still under way; 3 steps are logged"),
        ("result.json", '{"before": null}', "the run was not evaluated"),
        ("result.json", '{"details": {"after": [1], "before": {"greedy": {"n": "x", "ci95": [1]}}}}', ""),
        ("result.json", '{"a"', "result.json cannot be read"),
        ("before.json", "[1]", ""),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("environment.json", None, "environment.json is missing"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("metrics.jsonl", '{"step": 1}\n\x00\x00', "metrics.jsonl, line 2 is left out"),
        ("metrics.jsonl", '{"step": NaN, "a": {"b": {"c": [Infinity, 1e999]}}, "step2": "x"}\n[1]\n', "line 2 is left"),
        ("rollouts/step_00002.jsonl", None, "1 steps of metrics.jsonl have no rollouts file"),
        ("rollouts/step_00002.jsonl", "", "1 rollouts files are empty"),
        ("rollouts/step_00002.jsonl", '{"id": "a", "completion": "x"}\n{"id": "b"', "jsonl, line 2 is left out"),
        ("rollouts/step_00002.jsonl", '{"id": 1}\n', "1 rows of rollouts without a text `completion` are left out"),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_said_and_the_rest_is_shown(name, content, said, tmp_path):
    folder = made_run(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    payload = payload_of(folder)
    assert said in notes_of(payload) and payload["counts"]["steps"] >= 2 and render(payload)


def test_a_run_under_way_shows_what_it_has_logged(tmp_path):
    folder = made_run(tmp_path / "run")
    (folder / "before.json").write_text(json.dumps({"greedy": summary(1, 4), "settings": []}))
    (folder / "result.json").unlink()
    with open(folder / "rollouts" / "step_00003.jsonl.partial", "w") as file:
        file.write('{"completion": "half')
    lock = FolderLock(folder)
    assert lock.hold() is None
    payload = payload_of(folder)
    assert re.search(r"it is under way \(.+\); 3 steps are logged", notes_of(payload))
    left = (folder / "lock.json").read_text()
    lock.release()
    (folder / "lock.json").write_text(left)  # as a killed process leaves it
    assert "it was stopped; 3 steps are logged" in notes_of(payload_of(folder))
    assert [block["name"] for block in payload["runs"][0]["evaluations"]] == ["before, greedy"]


def test_what_a_resume_went_back_behind_is_counted_and_not_mixed_in(tmp_path):
    folder = made_run(tmp_path / "run")
    made_run(folder / "abandoned" / "001", steps=2)
    payload = payload_of(folder)
    assert payload["counts"]["steps"] == 3
    assert "abandoned/001 holds 2 steps that a resume went back behind; they are not shown" in notes_of(payload)


def test_a_run_without_rollouts_says_so_once(tmp_path):
    folder = made_run(tmp_path / "run", log_rollouts=False)
    shutil.rmtree(folder / "rollouts")
    payload = payload_of(folder)
    assert payload["groups"] == [] and notes_of(payload) == "rollouts were not logged (log_rollouts is false)"


def test_a_run_of_an_older_version_has_its_groups_and_links_its_sounds(tmp_path):
    """Its rows had neither group, nor tokens, nor the content of their clips; a row may follow itself in a step."""
    path, _ = wav(tmp_path / "a.wav")
    new = ("group", "rollout", "clip_keys", "parsed_answer", "missing", "length", "token_logps")
    rows = [{name: value for name, value in rollout_row(p, g).items() if name not in new} | {"clips": [path]}
            for p in (0, 0, 1) for g in range(2)]  # fmt: skip
    payload = payload_of(made_run(tmp_path / "run", 1, rows=rows))
    assert [(group["group"], group["id"], len(group["rollouts"])) for group in payload["groups"]] == [
        (0, "row0", 2), (1, "row0", 2), (2, "row1", 2),
    ]  # fmt: skip
    assert payload["groups"][0]["rollouts"][0]["tokens"] is None
    [clip] = payload["clips"].values()
    assert clip["src"] is None and clip["href"] == "../a.wav" and "a version that did not record" in clip["note"]


# -- what anybody may have written -------------------------------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script>\u2028\x00\ud800\u202e\x1b[31m'\"\\<!-- {{ 7 * 7 }}"


def test_hostile_text_is_text_and_its_tokens_are_its_pieces(tmp_path):
    row = rollout_row(
        completion=HOSTILE, id=HOSTILE, question=HOSTILE, choices=[HOSTILE], answer=HOSTILE, problems=[HOSTILE],
        rewards={HOSTILE: 1.0}, missing={HOSTILE: HOSTILE}, token_logps=[[9, len(HOSTILE) - 9], [-1, -2]],
        clips=[HOSTILE, "\x00", "../../../etc/passwd", "/etc/passwd"],
        clip_keys=[HOSTILE, "a", "b" * 64, "../" * 21 + "x"],
    ) | {HOSTILE: HOSTILE}  # fmt: skip
    folder = made_run(tmp_path / "run", 1, rows=[row])
    (folder / "config.yaml").write_text(json.dumps({HOSTILE.replace("\ud800", ""): {HOSTILE[:20]: [HOSTILE[:20]]}}))
    payload = payload_of(folder)
    rollout = payload["groups"][0]["rollouts"][0]
    assert rollout["completion"].startswith("</script><script>alert(1)</script>\\u2028\\x00\\ud800\\u202e\\x1b[31m")
    assert rollout["tokens"][0][0] == "</script>" and len(rollout["tokens"][0]) == 2
    assert all(clip["src"] is None for clip in payload["clips"].values())
    page = render(payload)
    assert "alert(1)" not in page and "\u2028" not in page.split("<script")[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": [1], "reward_total": "x", "advantage": True, "length": "9", "mean_logp": float("nan")},
        {"rewards": {"accuracy": float("nan"), "x": 10**400}, "advantage": float("inf"), "length": -1e305},
        {"token_logps": [[1], [2]]}, {"token_logps": [[10**30], [0]]}, {"token_logps": [[-1, len(TEXT) + 1], [0, 0]]},
        {"token_logps": [["a"], ["b"]]}, {"token_logps": {"a": 1}}, {"token_logps": [[len(TEXT)], [0.5]]},
        {"clips": "abc", "clip_keys": None}, {"clips": [1, {"a": 2}], "clip_keys": [1]}, {"choices": "ab"},
        {"question": None, "id": None, "answer": 3}, {"group": True}, {"group": 10**30},
        {"missing": [1], "problems": 2},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_other_types_are_left_out(changes, tmp_path):
    payload = payload_of(made_run(tmp_path / "run", 1, rows=[rollout_row(**changes), rollout_row(1)]))
    assert payload["counts"]["rollouts"] == 2 and render(payload)


def test_json_that_is_nested_as_deep_as_json_is_read(tmp_path):
    folder = made_run(tmp_path / "run", 1)
    for depth in (50, *range(900, 1000, 7)):
        nested = json.loads("[" * 10 + "]" * 10)
        line = json.dumps(rollout_row(deep=nested)).replace(json.dumps(nested), "[" * depth + "]" * depth)
        with open(folder / "rollouts" / "step_00001.jsonl", "a") as file:
            file.write(line + "\n")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(f'{{"step": 2, "deep": {"[" * depth}{"]" * depth}}}\n')
    assert payload_of(folder)["counts"]["rollouts"] >= 5


def test_a_completion_of_ten_megabytes_is_cut_and_says_so(tmp_path):
    text = "<think>" + "ab" * 5_000_000
    payload = payload_of(made_run(tmp_path / "run", 1, rows=[rollout_row(completion=text), rollout_row(1)]))
    completion = payload["groups"][0]["rollouts"][0]["completion"]
    assert completion == f"{text[:MAX_TEXT]} [... {len(text) - MAX_TEXT:,} more characters are in the file]"
    assert "1 completions are cut in the page" in notes_of(payload)
    assert payload["groups"][0]["rollouts"][0]["tokens"] is None


# -- sounds ------------------------------------------------------------------------------------------------------


def sound_run(tmp_path, count=2, **changes):
    clips = [wav(tmp_path / "data" / f"clip {i} ü#%.wav", 300 + 40 * i) for i in range(count)]
    rows = [rollout_row(i, g, (TEXT, WRONG)[g], clips=[path], clip_keys=[key], **changes)
            for i, (path, key) in enumerate(clips) for g in range(2)]  # fmt: skip
    return made_run(tmp_path / "run", 1, rows=rows), clips


def test_a_sound_in_the_page_is_the_sound_that_was_heard(tmp_path):
    folder, clips = sound_run(tmp_path)
    payload = payload_of(folder)
    assert payload["counts"]["sounds_embedded"] == 2 and payload["groups"][1]["clips"] == [clips[1][1]]
    for i, (_, key) in enumerate(clips):
        clip = payload["clips"][key]
        assert (clip["name"], clip["seconds"], clip["href"]) == (f"clip {i} ü#%.wav", 0.5, None)
        sound, rate = soundfile.read(io.BytesIO(base64.b64decode(clip["src"].partition(",")[2])))
        assert rate == 16_000 and clip["src"].startswith("data:audio/mpeg;") and len(clip["peaks"]) == 400
        loudest = np.abs(np.fft.rfft(sound[2000:6000])).argmax() * rate / 4000
        assert loudest == pytest.approx(300 + 40 * i, abs=5)


def test_a_file_that_changed_or_went_is_said_and_no_other_is_played(tmp_path):
    folder, clips = sound_run(tmp_path, 3)
    wav(Path(clips[0][0]), 999.0)
    os.remove(clips[1][0])
    for sounds in ("interest", "none"):
        payload = payload_of(folder, sounds=sounds)
        changed, gone, there = (payload["clips"][key] for _, key in clips)
        assert "the file is another than the run heard" in changed["note"] and "its file is missing" in gone["note"]
        assert changed["src"] is changed["href"] is gone["src"] is gone["href"] is None
        assert (there["src"] is None) == (sounds == "none")
        assert payload["counts"]["sounds_missing"] == 2 and "2 sounds are missing" in notes_of(payload)


def test_links_are_relative_to_the_page_and_quoted(tmp_path):
    folder, clips = sound_run(tmp_path, 1)
    payload = payload_of(folder, sounds="none", page=tmp_path / "pages" / "here" / "report.html")
    assert payload["clips"][clips[0][1]]["href"] == "../../data/clip%200%20%C3%BC%23%25.wav"
    assert payload["counts"]["sounds_linked"] == 1 and "1 sounds are not in the page but linked" in notes_of(payload)


def test_a_link_to_another_drive_is_absolute(tmp_path, monkeypatch):
    def refuse(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    assert relative_url(Path(os.fsdecode(b"/a/\xff b.wav")), "/a/c") == "../%FF%20b.wav"  # a name that is no UTF-8
    monkeypatch.setattr(os.path, "relpath", refuse)
    assert relative_url(Path("/d/a b.wav"), "/c") == "file:///d/a%20b.wav"


def test_sound_and_budget(tmp_path):
    """A page of 0.23 MB has room for some of 40 sounds; `all` takes them all, and says what that takes."""
    folder, clips = sound_run(tmp_path, 40)
    none, some, every = (
        payload_of(folder, max_mb=0.23, sounds=sounds)["counts"] for sounds in ("none", "interest", "all")
    )
    assert none["sounds_embedded"] == 0 < some["sounds_embedded"] < every["sounds_embedded"] == len(clips)
    assert some["bytes"] <= 230_000 < every["bytes"]
    assert len(render(payload_of(folder, max_mb=0.23))) <= 230_000
    assert "more than the budget of 0.23 MB" in notes_of(payload_of(folder, max_mb=0.23, sounds="all"))


def test_sounds_of_groups_to_look_at_come_first(tmp_path):
    clips = [wav(tmp_path / f"{i}.wav", 300 + 40 * i) for i in range(40)]
    folder = made_run(tmp_path / "run", 1)
    for step, (path, key) in enumerate(clips, 1):
        problem = {"stop_reason": "length"} if step == 7 else {}
        logged(folder, step, [rollout_row(step, clips=[path], clip_keys=[key], **problem)])
    payload = payload_of(folder, max_mb=0.28)
    embedded = {step for step, (_, key) in enumerate(clips, 1) if payload["clips"][key]["src"]}
    assert 7 in embedded and 40 in embedded and 1 not in embedded and len(embedded) < 40


def test_threads_do_not_show_in_the_page(tmp_path, monkeypatch):
    folder, _ = sound_run(tmp_path, 30)
    several = payload_of(folder, max_mb=0.25)
    assert 0 < several["counts"]["sounds_embedded"] < 30
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(sound, "_TOGETHER", 1)
    one = payload_of(folder, max_mb=0.25)
    played = [{key: clip["src"] for key, clip in payload["clips"].items()} for payload in (several, one)]
    assert played[0] == played[1] and several["groups"] == one["groups"]


def test_a_large_file_is_made_alone(tmp_path, monkeypatch):
    folder, clips = sound_run(tmp_path, 5)
    size = os.path.getsize(clips[0][0])
    monkeypatch.setattr(sound, "_MAX_TOGETHER", 2 * size)
    said = []
    payload = payload_of(folder, progress=lambda *how_far: said.append(how_far))
    assert payload["counts"]["sounds_embedded"] == 5
    assert [how_far for how_far in said if how_far[0] == "sounds"] == [("sounds", n, 5) for n in (0, 2, 4, 5)]


def test_how_far_it_is_is_told_before_each_part(tmp_path):
    folder, _ = sound_run(tmp_path)
    said = []
    payload_of(folder, progress=lambda *how_far: said.append(how_far))
    assert said == [("rollouts", 0, 1), ("rollouts", 1, 1), ("sounds", 0, 2), ("sounds", 2, 2)]


def test_what_is_no_sound_is_said(tmp_path):
    path = tmp_path / "notes.wav"
    path.write_text("not a sound")
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    payload = payload_of(made_run(tmp_path / "run", 1, rows=[rollout_row(clips=[str(path)], clip_keys=[key])]))
    assert "notes.wav: not readable as audio" in payload["clips"][key]["note"]


def test_a_sound_in_memory_is_kept_by_the_run_and_played(tmp_path):
    encoded = io.BytesIO()
    soundfile.write(encoded, tone(500), RATE, format="FLAC")
    clips = [Clip(data=encoded.getvalue()), Clip(array=2 * tone(700), sampling_rate=RATE)]
    keys = [content_key(clip) for clip in clips]
    folder = tmp_path / "run"
    rows = [rollout_row(0, g, clips=[clip.name for clip in clips], clip_keys=keys) for g in range(2)]
    kept = KeptSounds(folder, [Example("row0", tuple(clips), "What?")])
    assert kept.keep(rows) == 0 == kept.keep(rows)
    assert sorted(path.name for path in (folder / "clips").iterdir()) == sorted(
        [f"{keys[0]}.flac", f"{keys[1]}.array.flac"]
    )
    payload = payload_of(made_run(folder, 1, rows=rows))
    assert payload["counts"]["sounds_embedded"] == 2
    shutil.rmtree(folder / "clips")
    assert "the run kept no copy" in payload_of(folder)["clips"][keys[0]]["note"]


def test_a_run_keeps_the_sounds_of_the_rollouts_that_it_logs(tmp_path):
    clip = Clip(data=b"RIFF" + bytes(100))
    rows = [rollout_row(0, clips=["<bytes>"], clip_keys=[content_key(clip)])]
    for log in (False, True):
        options = Options()
        options.train.log_rollouts = log
        session = SimpleNamespace(run=Run(tmp_path), examples=[Example("row0", (clip,), "What?")], options=options)
        recorder = Recorder(cast("Any", session))
        recorder.begin(0)
        recorder.record(StepRecord(1, {"step": 1}, rows))
        recorder.end()
        assert [path.name for path in tmp_path.glob("clips/*")] == [f"{content_key(clip)}.wav"] * log
    Run(tmp_path).clear()
    assert not (tmp_path / "clips").exists()


def test_a_folder_of_kept_sounds_is_listed_once(tmp_path, monkeypatch):
    """5,000 of them, listed for each sound, take a minute."""
    rows = [rollout_row(p, clips=["<bytes>"], clip_keys=[f"{p:064x}"]) for p in range(20)]
    folder, listed, glob = made_run(tmp_path / "run", 1, rows=rows), [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: listed.append(path.name) or glob(path, pattern))
    assert payload_of(folder)["counts"]["sounds_missing"] == 20 and listed.count("clips") == 1


def test_sounds_in_memory_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("covo_rl.records.sounds.LIMIT", 20_000)
    clips = [Clip(data=b"RIFF" + bytes([i]) * 9_000) for i in range(4)]
    examples = [Example(f"row{i}", (clip,), "What?") for i, clip in enumerate(clips)]
    rows = [rollout_row(i, clip_keys=[content_key(clip)]) for i, clip in enumerate(clips)]
    assert KeptSounds(tmp_path, examples).keep(rows) == 2 and len(list((tmp_path / "clips").glob("*.wav"))) == 2
    assert KeptSounds(tmp_path, examples).keep(rows) == 2  # after a resume: neither written again, nor more of them


def test_a_link_in_the_place_of_a_kept_sound_is_not_followed(tmp_path):
    path, key = wav(tmp_path / "secret.wav")
    folder = made_run(tmp_path / "run", 1, rows=[rollout_row(clips=["<bytes>"], clip_keys=[key])])
    (folder / "clips").mkdir()
    os.symlink(path, folder / "clips" / f"{key}.array.flac")
    assert payload_of(folder)["clips"][key]["src"] is None


def test_peaks_and_picture_of_a_sound():
    rising = np.linspace(0, 0.5, 8000, dtype=np.float32)
    values = peaks(rising)
    assert len(values) == 400 and values[-1] == 127 and values[0] == 0 and values[0::2] == sorted(values[0::2])
    assert peaks(np.zeros(90, dtype=np.float32)) == [0] * 180
    sound = tone(1000, 1.0, 16_000)
    picture = mel_picture(sound, 16_000)
    assert (picture["frames"], picture["bins"]) == (125, 48) and mel_picture(np.tile(sound, 90), 16_000)[
        "frames"
    ] == 200
    levels = np.arange(15, dtype=np.uint8).reshape(3, 5)  # an odd width
    content = png(levels)
    width, height, depth = int.from_bytes(content[16:20]), int.from_bytes(content[20:24]), content[24]
    start = content.index(b"IDAT") + 4
    lines = zlib.decompress(content[start : start + int.from_bytes(content[start - 8 : start - 4])])
    assert (width, height, depth) == (5, 3, 4) and lines.hex() == "000123400056789000abcde0"


# -- the budget --------------------------------------------------------------------------------------------------


def random_rows(step, groups=8):
    draws = np.random.default_rng(step)
    words = ["".join(map(chr, draws.integers(97, 123, 7))) for _ in range(groups * 40)]
    for p in range(groups):
        text = " ".join(words[40 * p : 40 * p + 40])
        counts = [8] * 39 + [7]
        logps = draws.integers(-900, 0, 40).tolist()
        yield rollout_row(p, 0, text, token_logps=[counts, logps], length=40, rewards={"accuracy": 1.0})


def test_text_goes_first_then_log_probs_of_rollouts_to_look_at(tmp_path):
    folder = made_run(tmp_path / "run", 1, rows=list(random_rows(0)))
    for step in range(2, 33):
        rows = list(random_rows(step))
        rows[3]["stop_reason"] = "length"
        logged(folder, step, rows)
    payload = payload_of(folder, max_mb=0.32)
    counts = payload["counts"]
    flagged = [r for g in payload["groups"] for r in g["rollouts"] if "truncated" in r["flags"]]
    others = [r for g in payload["groups"] for r in g["rollouts"] if "truncated" not in r["flags"]]
    assert counts["steps"] == 32 and counts["steps_left_out"] == 0 and len(flagged) == 31
    assert sum(rollout["tokens"] is not None for rollout in flagged) > 5
    assert sum(rollout["tokens"] is not None for rollout in others) < 31  # the row that changed most
    assert counts["tokens_left_out"] == sum(r["tokens"] is None for r in [*flagged, *others])
    assert f"{counts['tokens_left_out']} rollouts are without the log-probs" in notes_of(payload)


def test_where_text_is_too_much_steps_between_go_and_are_counted(tmp_path):
    folder = made_run(tmp_path / "run", 1, rows=list(random_rows(0)))
    for step in range(2, 65):
        logged(folder, step, list(random_rows(step)))
    payload = payload_of(folder, max_mb=0.26)
    steps = sorted({group["step"] for group in payload["groups"]})
    gaps = np.diff(steps)
    assert steps[0] == 1 and steps[-1] == 64 and 4 < len(steps) < 40
    assert gaps.max() <= 4 * gaps.min() and payload["counts"]["steps_left_out"] == 64 - len(steps)
    assert f"{64 - len(steps)} logged steps are left out" in notes_of(payload)
    assert len(render(payload)) < 260_000


def test_the_last_step_is_there_whatever_it_takes(tmp_path):
    folder = made_run(tmp_path / "run", 5)
    payload = payload_of(folder, max_mb=0.01)
    assert {group["step"] for group in payload["groups"]} == {5} and "more than the budget" in notes_of(payload)


# -- several runs ------------------------------------------------------------------------------------------------


def test_runs_are_compared_where_they_differ(tmp_path):
    one, other = made_run(tmp_path / "a", beta=0.0, seed=1, output="x"), made_run(tmp_path / "b", beta=0.1, seed=1)
    (other / "result.json").unlink()
    payload = payload_of(one, other)
    assert payload["comparison"]["config"] == [{"option": "beta", "values": [0.0, 0.1]}]
    assert payload["comparison"]["evaluations"][0] == {
        "name": "before, greedy", "n": [4, None], "accuracy": [0.25, None], "ci95": [[0.2, 0.8], None],
    }  # fmt: skip
    assert {group["run"] for group in payload["groups"]} == {0, 1} and "different rows" not in notes_of(payload)
    (other / "environment.json").write_text(json.dumps({"sha256": {"data": "bb"}}))
    payload = payload_of(one, other)
    assert {"option": "sha256 of data", "values": ["aa", "bb"]} in payload["comparison"]["config"]
    assert "the runs were evaluated on different rows" in notes_of(payload)
    assert "different rewards" not in notes_of(payload)
    (other / "environment.json").write_text(json.dumps({"sha256": {"data": ["b"]}}))  # of another program
    assert "the runs were evaluated on different rows" in notes_of(payload_of(one, other))
    gated = made_run(tmp_path / "c", rewards={"accuracy": 1.0}, reward_gate="accuracy")
    assert "the runs have different rewards" in notes_of(payload_of(one, gated))
