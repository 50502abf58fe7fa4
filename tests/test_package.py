"""What the package promises as a whole: light imports, small files, one name in site-packages."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIGHT = [
    "covo_rl", "covo_rl.config", "covo_rl.types", "covo_rl.prompt", "covo_rl.data", "covo_rl.audio", "covo_rl.rewards",
    "covo_rl.resolve", "covo_rl.synth", "covo_rl.cli", "covo_rl.rewards.cli", "covo_rl.evaluate.cli", "covo_rl.data_cli",
    "covo_rl.export.cli", "covo_rl.bench.cli", "covo_rl.doctor",
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
    assert sum(sizes.values()) <= 20_000_000


def test_the_wheel_holds_one_top_level_name():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = config["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["covo_rl"]
    assert all(target.startswith("covo_rl/_bundled/") for target in wheel["force-include"].values())


@pytest.mark.parametrize("words", [["--help"], ["rewards", "--help"], ["eval", "--help"], ["data", "--help"],
                                   ["export", "--help"], ["doctor", "--help"], ["bench", "--help"]])  # fmt: skip
def test_every_command_answers_help(words):
    code = "import sys; from covo_rl.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_an_unknown_command_lists_those_that_exist():
    code = "from covo_rl.cli import main; main(['trian'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "trian" in done.stderr and "train" in done.stderr and "rewards" in done.stderr
