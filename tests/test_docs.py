"""Everything that README and docs print can be typed: python runs as printed, options of commands exist."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest
import typer

from covo_rl.cli import COMMANDS
from covo_rl.config import option_names, parse_options

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "checkpoints" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
WORDS = ("covo-rl ", "make ", "python ", "accelerate ", ".venv/bin/")


def python_blocks():
    for page in PAGES:
        for number, (language, code) in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
            if language == "python":
                yield pytest.param(code, id=f"{page.name}-{number}")


@pytest.mark.parametrize("code", python_blocks())
def test_every_python_block_runs_as_printed(code, tmp_path, monkeypatch):
    """finding 41: snippets used names that are defined nowhere."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def command_lines():
    """(page, line) of every command in fenced, indented and inline code, continued lines joined, comments off."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = [code for language, code in FENCE.findall(text) if language in ("", "bash")]
        rest = FENCE.sub("", text)
        inline = re.findall(r"`([^`]+)`", rest)
        indented = re.findall(r"^    (\S(?:.*\\\n)*.*)", rest, re.MULTILINE)
        for code in [*fenced, *inline, *indented]:
            for line in code.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s+#\s.*|\s\.\.\.$", "", line).strip()
                if line.startswith(WORDS):
                    yield page.name, " ".join(line.split())


LINES = sorted(set(command_lines()))


def parses_as_covo_rl(words: list[str]) -> None:
    """Click reads the words as it does when they are typed; nothing runs, files need not exist."""
    if not words or words[0] == "COMMAND":
        return
    module, attribute, _ = COMMANDS[words[0]]
    if words[0] == "train":
        return parses_as_recipe(words[1:])
    app = getattr(import_module(module), attribute)
    if not isinstance(app, typer.Typer):
        plain, app = app, typer.Typer()
        app.command()(plain)
    command, words = typer.main.get_command(app), words[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context("covo-rl", list(words), resilient_parsing=len(words) < 2)
    assert not context.args, f"left over: {context.args}"


def parses_as_recipe(words: list[str]) -> None:
    if "--help" not in words:
        words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
        parse_options(words)


def parses(line: str) -> None:
    words = shlex.split(re.sub(r"\s\[.*\]", "", line))
    if words[0] == "covo-rl":
        return parses_as_covo_rl(words[1:])
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if "-m" in words:
        module = words[words.index("-m") + 1]
        import_module(module)
        if module == "covo_rl.evaluate.cli":
            parses_as_covo_rl(["eval", *words[words.index("-m") + 2 :]])
        return
    scripts = [i for i, word in enumerate(words) if word.endswith(".py") and "/" in word]
    for i in scripts:
        assert (ROOT / words[i]).is_file(), f"{words[i]} does not exist"
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).exists(), f"{word} does not exist"
    if scripts and words[scripts[0]] == "recipes/grpo_mmau.py":
        parses_as_recipe(words[scripts[0] + 1 :])
    if scripts and words[scripts[0]] == "recipes/sft_cot.py":
        runpy.run_path(str(ROOT / "recipes" / "sft_cot.py"))["parser"]().parse_args(words[scripts[0] + 1 :])


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_every_printed_command_line_parses(page, line):
    """finding 41: options of the commands in README and docs exist, and so do their scripts and targets."""
    try:
        parses(line)
    except (SystemExit, click.ClickException, argparse.ArgumentError) as error:
        pytest.fail(f"{page}: {line}: {getattr(error, 'message', error)}")


def test_the_pages_name_options_of_the_recipe_that_exist():
    """finding 41: `--flag` in inline code of the pages about training is an option of it, or of a command."""
    known = {name.replace("_", "-") for name in option_names()} | {"full", "config", "help"}
    text = (ROOT / "docs" / "resilience.md").read_text() + (ROOT / "docs" / "adapters.md").read_text()
    flags = {flag.replace("_", "-") for flag in re.findall(r"`--([a-z][\w-]+)", text)}
    others = {"allow-noop", "export-checkpoints", "merged", "base-model", "adapter", "dtype", "ranks", "toy"}
    others |= {"num-processes", "mixed-precision"}  # of accelerate launch
    assert flags - known - others == set()


def test_the_time_that_the_demo_takes_is_said_in_one_way():
    """finding 41: the Makefile said ten minutes, README three."""
    pages = [ROOT / "README.md", ROOT / "Makefile", ROOT / "recipes" / "grpo_mmau.py", ROOT / "recipes" / "README.md"]
    times = [re.findall(r"(\w+) (?:CPU )?minutes", page.read_text(encoding="utf-8")) for page in pages]
    assert [set(found) - {"15"} for found in times] == [{"three"}] * 4
