"""The vLLM plug-in. vLLM lives in an environment of its own (docs/serving.md); without it only names are checked."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from covo_rl import serve
from covo_rl.run.rollout_server import GATE

ROOT = Path(__file__).parent.parent


class Registry:
    """As much of vLLM's ModelRegistry as the plug-in uses."""

    def __init__(self) -> None:
        self.calls = []

    def get_supported_archs(self):
        return {"LlamaForCausalLM", *(name for name, _ in self.calls)}

    def register_model(self, name, place):
        self.calls.append((name, place))

    def register_engine(self, name, module, cls):
        """As much of vLLM's WeightTransferEngineFactory."""
        if name in {known for known, _ in self.calls}:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        self.calls.append((name, f"{module}:{cls}"))


def test_every_architecture_is_registered_once(monkeypatch):
    models, engines = Registry(), Registry()
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=models))
    monkeypatch.setitem(sys.modules, "vllm.distributed", types.ModuleType("distributed"))
    transfer = types.SimpleNamespace(WeightTransferEngineFactory=engines)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", transfer)
    serve.register()
    serve.register()  # vLLM loads its plug-ins in every process, and more than once
    assert dict(models.calls) == serve.ARCHITECTURES
    assert len(models.calls) == len(serve.ARCHITECTURES)
    assert engines.calls == [(serve.WEIGHT_BACKEND, ":".join(serve.WEIGHT_ENGINE))]


@pytest.mark.parametrize("place", [*serve.ARCHITECTURES.values(), ":".join(serve.WEIGHT_ENGINE)])
def test_what_is_registered_is_a_class_of_that_name_in_its_module(place):
    """vLLM imports the string much later, in another process."""
    module, cls = place.split(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert cls in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def vllm_python() -> str | None:
    given = os.environ.get("COVO_RL_VLLM_PYTHON")
    return given or (sys.executable if importlib.util.find_spec("vllm") else None)


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason="vLLM is not importable; set COVO_RL_VLLM_PYTHON (docs/serving.md)")
@pytest.mark.parametrize("words", [["--lora_r", "20"], ["--full"]], ids=["lora", "full"])
def test_vllm_reads_the_command_of_a_rollout_server_as_it_is_meant(words, monkeypatch):
    """Every flag is one of this release's, with the value that was written."""
    from covo_rl.config import parse_options
    from covo_rl.run.rollout_server import serve_command, served_arguments

    monkeypatch.chdir(ROOT)
    options = parse_options(["--config", "recipes/configs/tiny.yaml", "--limit", "4", *words])
    command = serve_command(options, "127.0.0.1", 8000, cpu=True).replace("\\\n", "")
    flags = shlex.split(command.partition("api_server")[2])
    code = """import json
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
read = vars(make_arg_parser(FlexibleArgumentParser()).parse_args())
print("READ " + json.dumps(read, default=lambda value: getattr(value, "__dict__", str(value))))"""
    done = subprocess.run([vllm_python(), "-c", code, *flags], capture_output=True, text=True, check=False, cwd=os.sep)
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout.partition("READ ")[2])
    for name, value in served_arguments(options, cpu=True).items():
        assert read[name] == value or {**value}.items() <= read[name].items(), name
    assert read["middleware"] == [GATE] and read["enable_scale_out"] is True


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason="vLLM is not importable; set COVO_RL_VLLM_PYTHON (docs/serving.md)")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["covo_audio", "qwen2_audio", "audioflamingo3", "glmasr", "qwen3_asr"])
def test_exports_answer_on_vllm_as_the_policy_does(family):
    script = ROOT / "tests" / "serving" / "vllm_check.py"
    done = subprocess.run(
        [vllm_python(), str(script), "--family", family], capture_output=True, text=True, check=False, cwd=os.sep
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(": ok") == 3  # merged, adapter, base


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason="vLLM is not importable; set COVO_RL_VLLM_PYTHON (docs/serving.md)")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["covo_audio", "qwen2_audio"])
def test_what_is_sent_to_vllm_runs_there_and_stale_caches_show(family):
    script = ROOT / "tests" / "serving" / "weights_check.py"
    done = subprocess.run(
        [vllm_python(), str(script), "--family", family], capture_output=True, text=True, check=False, cwd=os.sep
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
