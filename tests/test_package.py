"""What the package promises as a whole: light imports, small files, one name in site-packages."""

import importlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIGHT = [
    "covo_rl", "covo_rl.config", "covo_rl.types", "covo_rl.prompt", "covo_rl.data", "covo_rl.audio", "covo_rl.rewards",
    "covo_rl.resolve", "covo_rl.synth", "covo_rl.cli", "covo_rl.rewards.cli", "covo_rl.evaluate.cli",
    "covo_rl.evaluate.speech", "covo_rl.run.commands.data", "covo_rl.run.report.page",
    "covo_rl.export.cli", "covo_rl.bench.cli", "covo_rl.run.doctor",
]  # fmt: skip


def test_pure_modules_import_no_torch():
    files = [str(p) for folder in ("rewards", "eval_sets") for p in sorted((ROOT / folder).glob("*.py"))]
    code = f"""
import importlib, runpy, sys
for name in {LIGHT!r}:
    importlib.import_module(name)
    heavy = [m for m in ("torch", "transformers") if m in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
for path in {files!r}:
    runpy.run_path(path)
    heavy = [m for m in ("torch", "transformers") if m in sys.modules]
    assert not heavy, f"{{path}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_file_is_too_large():
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT, timeout=30)
    if tracked.returncode:
        pytest.fail("not a git checkout: this test reads the list of tracked files")
    sizes = {name: (ROOT / name).stat().st_size for name in tracked.stdout.decode().split("\0") if name}
    assert max(sizes.values()) <= 5_000_000
    assert sum(sizes.values()) <= 30_000_000


def test_the_wheel_holds_one_name_and_finds_what_is_bundled(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    top = {path.name for path in site.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"covo_rl"}
    report = site / "covo_rl/run/report"
    assert {path.suffix for path in report.glob("static/*")} == {".js", ".css"} and any(report.glob("*.jinja"))
    assert {path.name for path in site.glob("*.dist-info/licenses/**/*LICENSE")} == {
        "LICENSE", "uPlot.LICENSE", "whisper.LICENSE",
    }  # fmt: skip
    code = """
import covo_rl
from covo_rl.resolve import find
from covo_rl.rewards import load_reward
assert "site" in covo_rl.__file__, covo_rl.__file__
gold = {"question": ["?"], "choices": [["cat", "dog"]], "answer": ["dog"]}
said = ["<think>It barks.</think><answer>dog</answer>"]
assert load_reward("accuracy")(prompts=["?"], completions=said, **gold) == [1.0]
for kind, name in [("recipes", "grpo_mmau.py"), ("eval_sets", "mmau.py"), ("checkpoints", "tiny"),
                   ("docs", "troubleshooting.md")]:
    assert "_bundled" in str(find(kind, name)), find(kind, name)
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=elsewhere, env=env, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["rewards", "--help"], ["eval", "--help"], ["data", "--help"],
                                   ["export", "--help"], ["doctor", "--help"], ["bench", "--help"]])  # fmt: skip
def test_every_command_answers_help(words):
    code = "import sys; from covo_rl.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_the_serving_plugin_is_an_entry_point():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    target = config["project"]["entry-points"]["vllm.general_plugins"]["covo_rl"]
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_an_unknown_command_lists_those_that_exist():
    code = "from covo_rl.cli import main; main(['trian'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "trian" in done.stderr and "train" in done.stderr and "rewards" in done.stderr
