"""benchmarks/gpu.py: parts that fail alone, commands that end in time, and the whole of it on a CPU at tiny widths."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from covo_rl.bench.parts import bounded_run, run_parts
from covo_rl.bench.profiling import device_profile
from covo_rl.bench.recipe import recipe_steps, text_length
from covo_rl.bench.sizes import MODEL_SIZES

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_leaves_what_it_had_and_the_next_goes_on(tmp_path):
    path, seen = tmp_path / "out.json", []

    def good(left):
        seen.append(left())
        assert json.loads(path.read_text())["good"] == {"status": "cut off", "results": {}}  # before its first result
        yield "a", 1
        yield "b", json.loads(path.read_text())["good"]  # on disk while the part still runs

    def bad(left):
        yield "first", {"x": 2}
        raise RuntimeError("no such kernel")

    def late(left):
        yield "y", 3

    record = run_parts({"bad": bad, "good": good, "other": late}, path, only=["bad", "good"], limit_s=100)
    assert json.loads(path.read_text()) == record
    assert record["bad"]["status"] == "failed" and record["bad"]["results"] == {"first": {"x": 2}}
    assert "no such kernel" in record["bad"]["traceback"] and '"covo_rl/bench/parts.py"' in record["bad"]["traceback"]
    assert record["good"]["results"]["b"] == {"status": "cut off", "results": {"a": 1}}
    assert record["good"]["status"] == "ok" and 0 < seen[0] <= 100
    assert record["other"] == {"status": "skipped", "why": "not asked for"}


def test_no_part_begins_after_the_limit(tmp_path):
    def slow(left):
        time.sleep(0.2)
        yield "a", 1

    record = run_parts({"one": slow, "two": slow}, tmp_path / "out.json", limit_s=0.1)
    assert [part["status"] for part in record.values()] == ["ok", "skipped"]
    assert "limit of 0 s" in record["two"]["why"]
    with pytest.raises(ValueError, match="no part is named tow; there are one"):
        run_parts({"one": slow}, tmp_path / "out.json", only=["tow"])


def test_a_command_is_stopped_in_time_and_its_last_lines_are_there(tmp_path):
    done = bounded_run([sys.executable, "-c", "print('a\\nb'); raise SystemExit(3)"], 60, tmp_path)
    assert (done["rc"], done["last_lines"], done["stopped_after_s"]) == (3, ["a", "b"], None)
    assert sys.prefix not in done["command"] and "bin/python" in done["command"]
    # a process of its own session that holds the output open, as launchers start them
    words = "import subprocess as s, time; print('begun', flush=True); s.Popen(['sleep', '3'], start_new_session=True)"
    done = bounded_run([sys.executable, "-c", words + "; time.sleep(60)"], 2, tmp_path)
    assert done["rc"] is None and done["stopped_after_s"] == 2 and done["last_lines"] == ["begun"]
    assert done["seconds"] < 20


def test_profile_counts_operations_and_names_the_longest():
    a = torch.ones(300, 300)
    seen = device_profile(torch.device("cpu"), lambda: [a @ a for _ in range(5)], top=2)
    assert seen["top"][0][:2] == ("aten::mm", 5)
    assert len(seen["top"]) == 2 and seen["operations"] >= 5
    assert seen["busy_ms"] >= sum(ms for _, _, ms in seen["top"]) > 0


def test_a_step_of_the_recipe_says_where_its_time_goes(tmp_path, monkeypatch):
    monkeypatch.setitem(MODEL_SIZES, "tiny", MODEL_SIZES["tiny"].__class__(2, 64, 4, 1, 64, 1000, 8))
    steps = list(recipe_steps("tiny", steps=2, prompts=2, completion=6, folder=tmp_path / "run"))
    for step in steps:
        phases = step["seconds"]
        assert {"encode", "sample", "score", "update"} <= set(phases)
        assert sum(phases[name] for name in ("encode", "sample", "score", "update")) <= phases["step"]
        assert step["grad_norm"] > 0, "something trains: the reward differs within a group"
        assert step["sampling/sampling_logp_difference/mean"] < 0.1
    assert text_length(["", "abc", "x" * 9]) == [0, 3 / 8, 1 / 8]


#: parts that take few seconds at two layers; the others are tried with -m slow
LIGHT = "environment,profile,tests,recipe,runs"


@pytest.mark.parametrize("only", [LIGHT, pytest.param("", marks=pytest.mark.slow)], ids=["light parts", "all parts"])
def test_the_script_runs_on_a_cpu(only, script, tmp_path, monkeypatch, capsys):
    """Every part but those of other processes, at two layers; what cannot run here is recorded, not raised."""
    monkeypatch.setitem(MODEL_SIZES, "tiny", MODEL_SIZES["tiny"].__class__(2, 64, 4, 1, 64, 1000, 8))
    ran = []
    monkeypatch.setattr(
        script,
        "bounded_run",
        lambda command, limit, folder: ran.append(command) or {"rc": 0, "last_lines": ["2 passed in 1s"]},
    )
    path = tmp_path / "gpu.json"
    words = ["gpu.py", "--size", "tiny", "--device", "cpu", "--json", str(path), "--commit", "abc", "--only", only]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    record = json.loads(path.read_text())
    asked = {name: part for name, part in record.items() if not only or name in only.split(",")}
    assert {name: part["status"] for name, part in asked.items()} == dict.fromkeys(asked, "ok"), record
    assert {part["status"] for name, part in record.items() if name not in asked} <= {"skipped"}
    assert record["environment"]["results"]["software"]["commit"] == "abc"
    assert record["environment"]["results"]["speed_bfloat16"]["flops"] > 0
    assert set(record["profile"]["results"]) == {"decode_16_steps", "loss_of_one_group"}
    assert record["tests"]["results"]["pytest"]["counts"] == {"passed": 2}
    assert len(record["recipe"]["results"]) == 3
    launched = [command for command in ran if "recipes/grpo_mmau.py" in command]
    assert set(record["runs"]["results"]) == set(script.RUNS) and len(launched) >= 4
    assert all((SCRIPT.parents[1] / word).is_file() for command in launched for word in command if "recipes/" in word)
    assert f"environment ok, decode {'skipped' if only else 'ok'}" in capsys.readouterr().out
    if only:
        return
    assert list(record["decode"]["results"]) == ["G2_C8", "G4_C8", "G2_C16"]
    assert [row["stock"] is None for row in record["decode"]["results"].values()] == [False, False, True]
    assert record["lengths"]["results"]["sampling"]["random"]["tokens"] > 0
    speech = record["speech"]["results"]
    assert speech["float32_B2"]["real_time_factor"] > 0 and speech["bfloat16_stream"]["pieces"] == 1
    assert {"tokenizer", "vocoder", "flow"} <= set(speech) and speech["tokenizer"]["planned_gib"] > 0


def test_results_are_never_overwritten(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    first = script.result_path(torch.device("cpu"), "7b")
    first.write_text("{}")
    assert first.name.endswith("-cpu.json")
    assert script.result_path(torch.device("cpu"), "7b").name == first.stem + "-2.json"


def test_results_that_are_kept_can_be_read():
    files = list((SCRIPT.parent / "results").glob("*.json"))
    assert files and all(isinstance(json.loads(path.read_text()), dict) for path in files)
