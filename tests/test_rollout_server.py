"""covo-rl rollout-server, and evaluations on a server: the command starts, what is wrong is refused, figures agree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "serving"))

from fake_server import FakeServer

from covo_rl import serve
from covo_rl.audio import ClipStore
from covo_rl.cli import main
from covo_rl.config import AdapterConfig, EngineConfig, ModelConfig, parse_options
from covo_rl.engines import servers
from covo_rl.engines.policy_files import AdapterFiles
from covo_rl.evaluate.engine import ENGINE_OPTIONS
from covo_rl.policy.loading import trainable_policy
from covo_rl.run.rollout_server import GATE, counted_positions, serve_command, serve_notes

KEY = "a-key-of-the-test"
TINY = ["--config", "recipes/configs/tiny.yaml", "--limit", "4", "--eval_limit", "2"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(capsys, monkeypatch):
    """A command's exit code, and what it printed."""

    def call(*words):
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            print(ended.code if isinstance(ended.code, str) else "")
        out, err = capsys.readouterr()
        return code, out + err

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(servers, "PAUSES", (0.0, 0.01))
    return call


def trained():
    model = ModelConfig("builtin:tiny", "float32")
    return trainable_policy(model, AdapterConfig(), clips=ClipStore(), device=torch.device("cpu"), learning_rate=1e-3)


@pytest.fixture(scope="module")
def tiny():
    return trained()[0]


@pytest.fixture
def server(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with FakeServer(tiny, key=KEY) as fake:
        yield fake


# -- the command -------------------------------------------------------------------------------------------------------


def options(*words):
    return parse_options([*TINY, *words])


def started(command, folder, **variables):
    """What the command starts as vllm: (its words, its VLLM variables), or None where it starts nothing."""
    program = folder / "vllm"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"; env | grep ^VLLM_\n')
    program.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    return None if done.returncode else ([x for x in lines if "VLLM_" not in x], [x for x in lines if "VLLM_" in x])


def test_the_command_starts_vllm_with_what_the_run_needs_and_nothing_without_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = options("--lora_r", "20", "--max_completion_length", "50", "--vllm_options", "max_num_seqs=64")
    command = serve_command(made, "10.0.0.7", 8001)
    assert started(command, tmp_path) is None, "nothing listens without a key"
    words, variables = started(command, tmp_path, VLLM_API_KEY=KEY)
    flags = dict(zip(words[2::2], words[3::2], strict=False)) | dict(zip(words[3::2], words[4::2], strict=False))
    assert words[0] == "serve" and Path(words[1]).name == "tiny"
    assert (flags["--host"], flags["--port"]) == ("10.0.0.7", "8001")
    assert flags["--max-lora-rank"] == "32", "vLLM makes room for 16 or 32, not for 20"
    assert int(flags["--max-model-len"]) == counted_positions(made)
    assert flags["--logprobs-mode"] == "processed_logprobs" and flags["--max-num-seqs"] == "64"
    assert "--enable-scale-out" in words and "--enable-lora" in words
    assert {*variables} == {f"VLLM_API_KEY={KEY}", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"}
    assert KEY not in command


def test_full_weights_ask_for_no_adapters_and_a_length_that_is_named_reads_no_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = serve_command(options("--full", "--vllm_max_model_length", "300", "--data", "absent.json"), "::1", 80)
    words, variables = started(command, tmp_path, VLLM_API_KEY=KEY)
    assert "--enable-lora" not in words and "300" in words and "VLLM_SERVER_DEV_MODE=1" in variables
    assert json.loads(words[words.index("--weight-transfer-config") + 1]) == {"backend": serve.WEIGHT_BACKEND}


@pytest.mark.parametrize(
    ("host", "count"), [("127.0.0.1", 1), ("10.1.2.3", 1), ("gpu-7", 1), ("::1", 1), ("0.0.0.0", 2), ("8.8.8.8", 2)]
)
def test_an_address_that_others_can_reach_is_said(host, count):
    notes = serve_notes(host)
    assert len(notes) == count and all(host in note for note in notes[1:])


def test_the_middleware_of_the_command_is_there():
    module, _, name = GATE.rpartition(".")
    assert callable(getattr(import_module(module), name))


def test_wrong_words_are_answered_as_by_train(run):
    code, said = run("rollout-server", "--max-stepz", "3")
    assert code == 2 and "did you mean max_steps" in said


# -- a server that runs ------------------------------------------------------------------------------------------------


def test_a_server_that_runs_the_policy_passes_and_is_left_without_adapters(server, run):
    code, said = run("rollout-server", *TINY, "--check", server.url)
    assert code == 0 and "runs this policy" in said and "vLLM 0.31.0" in said and "note" not in said
    assert not server.adapters and KEY not in said


def test_a_server_that_asks_for_no_key_passes_with_a_note(server, run):
    server.key = ""
    code, said = run("rollout-server", *TINY, "--check", server.url)
    assert code == 0 and "asks for no key" in said


@pytest.mark.parametrize(("change", "message"), [
    ({"no_op": True}, "does not run the policy"),
    ({"version": "0.27.1"}, "0.27.1"),
    ({"max_model_len": 60}, "--max-model-len"),
    ({"key": "another"}, "VLLM_API_KEY"),
])  # fmt: skip
def test_what_is_wrong_with_a_server_ends_the_check_with_1(server, run, change, message):
    vars(server).update(change)
    code, said = run("rollout-server", *TINY, "--check", server.url)
    assert code == 1 and message in said and KEY not in said and "Traceback" not in said


def test_a_check_of_nobody_names_the_address(run):
    code, said = run("rollout-server", *TINY, "--check", "http://127.0.0.1:9")
    assert code == 1 and "127.0.0.1:9" in said
    code, said = run("rollout-server", *TINY, "--check", "ftp://x")
    assert code == 1 and "http" in said


# -- evaluations -------------------------------------------------------------------------------------------------------

EVAL = ["--set", "builtin", "--model", "builtin:tiny", "--dtype", "float32", "--limit", "4",
        "--max-completion-length", "6", "--rewards", "none", "--no-plots"]  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def with_server(server, *words):
    return ["--use-vllm", "--vllm-mode", "server", "--vllm-server-base-url", server.url, *words]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved adapter that changes the tiny model's answers."""
    policy, trainable = trained()
    with torch.no_grad():
        for n, parameter in enumerate(p for p in policy.family.model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)))
    folder = tmp_path_factory.mktemp("saved")
    files = AdapterFiles(trainable, folder)  # which go with it
    return shutil.copytree(files.write(1), folder / "adapter")


@pytest.mark.parametrize("tuned", [False, True])
def test_an_evaluation_on_a_server_is_that_of_the_policy_itself(server, run, tmp_path, adapter, tuned):
    words = [*EVAL, *(["--adapter", adapter] if tuned else [])]
    assert run("eval", *words, "--output", tmp_path / "own")[0] == 0
    code, said = run(
        "eval", *words, *with_server(server), *([] if tuned else ["--listen"]), "--output", tmp_path / "served"
    )
    assert code == 0, said
    own, served = records(tmp_path / "own"), records(tmp_path / "served")
    assert [row["replies"] for row in own] == [row["replies"] for row in served]
    assert server.paths()["/inference/v1/generate"] >= (1 if tuned else 4) * len(own), "also silence and all"
    assert (server.paths()["/v1/load_lora_adapter"] > 0) is tuned and not server.adapters
    report = json.loads((tmp_path / "served" / "report.json").read_text())
    assert report["engine"] == {"vllm_mode": "server", "vllm_options": None}


def test_an_evaluation_whose_server_goes_away_ends_with_a_message_and_goes_on_when_it_is_back(server, run, tmp_path):
    words = [*EVAL, "--batch-size", "2", *with_server(server, "--engine-patience", "0.3"), "--output", tmp_path / "e"]
    server.faults = ["", "", "", *["500"] * 20]
    code, said = run("eval", *words)
    assert code == 2 and "engine_patience" in said and "Traceback" not in said
    finished = len(records(tmp_path / "e"))
    assert 0 < finished < 4
    server.faults, before = [], server.paths()["/inference/v1/generate"]
    assert run("eval", *words)[0] == 0
    assert server.paths()["/inference/v1/generate"] - before == 4 - finished + 1, "the rest, and one for the probe"


def test_a_profile_on_a_server(server, run, tmp_path):
    from covo_rl.synth import builtin_questions

    data = builtin_questions()["test"]
    code, said = run(
        "data", "profile", data, "--limit", "3", "--n", "2", "--max-completion-length", "8",
        "--output", tmp_path / "p", *with_server(server),
    )  # fmt: skip
    assert code == 0, said
    result = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert result["n"] == 3 and result["engine"]["vllm_mode"] == "server"


@pytest.mark.parametrize(("words", "message"), [
    (["--use-vllm", "--vllm-mode", "server"], "vllm_server_base_url"),
    (["--use-vllm", "--vllm-mode", "sever"], "choose colocate or server"),
    (["--use-vllm", "--load-in-4bit"], "--load-in-4bit"),
    (["--use-vllm", "--vllm-tensor-parallel-size", "2"], "--vllm-mode server"),
])  # fmt: skip
def test_engine_options_that_do_not_fit_are_refused_before_anything_is_written(run, tmp_path, words, message):
    code, said = run("eval", *EVAL, *words, "--output", tmp_path / "e")
    assert code == 2 and message in said and not (tmp_path / "e").exists()


def test_evaluations_have_the_engine_options_of_training_but_for_those_of_an_update():
    left = {*vars(EngineConfig())} - {*ENGINE_OPTIONS}
    assert left == {"vllm_enable_sleep_mode", "rollout_ahead", "failed_groups_limit"}
