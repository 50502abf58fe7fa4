"""Everything that README and docs print can be typed: python runs as printed, options of commands exist.

Python blocks are executed, those of SESSIONS one after the other, and so is the notebook. Command lines are parsed by
the command that they name and not run: they train, serve, or need files and devices of the user's; the tests of each
command and tests/test_recipes.py run commands like them. YAML and JSON are parsed, the layouts of docs/data.md read by
tests/test_data_docs.py. Blocks without a language that name no command show output, and nothing checks them.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile
import typer
from accelerate.commands.launch import launch_command_parser

from covo_rl.cli import COMMANDS, RECIPES
from covo_rl.config import option_names, parse_options
from covo_rl.duplex.config import DuplexConfig
from covo_rl.models.builtin import TINY_MODELS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "checkpoints" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
PATHS = re.compile(r"\b((?:covo_rl|recipes|tests|rewards|eval_sets|benchmarks|docs)/[\w/.-]*\w\.(?:py|yaml|md))")
#: an option's name, then "default" and a number in the same line
DEFAULTS = re.compile(r"`?-*([a-z]+(?:[_-][a-z]+)+)`?[^\n`]*?\bdefault:? `?(\d[\d.e-]*)\b")
WORDS = ("covo-rl ", "make ", "python ", "accelerate ", ".venv/bin/", "sbatch ", "recipes/ssh/launch.sh ")


#: pages whose python blocks go on from one another
SESSIONS = ("python.md",)
LANGUAGES = {"", "bash", "python", "yaml", "json", "csv", "tsv"}


def python_blocks():
    for page in PAGES:
        text = re.sub("<!-- path -->.*?<!-- /path -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        fences = enumerate(FENCE.findall(text))  # the path is walked by .ci/stranger.py, after what it goes on from
        blocks = [(number, code) for number, (language, code) in fences if language == "python"]
        if page.name in SESSIONS:
            blocks = [(0, "\n".join(code for _, code in blocks))]
        for number, code in blocks:
            yield pytest.param(code, id=f"{page.name}-{number}")


@pytest.mark.parametrize("code", list(python_blocks()))
def test_every_python_block_runs_as_printed(code, tmp_path, monkeypatch):
    """finding 41: snippets used names that are defined nowhere."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("clip.wav", np.sin(np.arange(16_000) / 9), 16_000)  # a reader's own
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_a_notebook_runs_from_top_to_bottom_and_is_stored_without_outputs(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "stored with outputs"
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in cells) and (tmp_path / "runs" / "tiny" / "report.html").is_file()


def test_every_fence_says_what_it_holds_and_its_yaml_and_json_can_be_read():
    import yaml

    for page in PAGES:
        for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            assert language in LANGUAGES, f"{page.name}: nothing tries a block of {language}"
            if language == "yaml":
                assert yaml.safe_load(code), page.name
            if language == "json":
                for line in filter(str.strip, code.splitlines()) if code.count("\n{") else [code]:
                    json.loads(line)


def command_lines():
    """(page, line) of every command in fenced, indented and inline code, continued lines joined, comments off."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = [code for language, code in FENCE.findall(text) if language in ("", "bash")]
        rest = FENCE.sub("", text)
        inline = re.findall(r"`([^`]+)`", rest)
        indented = re.findall(r"^    (\S(?:.*\\\n)*.*)", rest, re.MULTILINE)
        for code in [*fenced, *inline, *indented]:
            for line in code.replace("\\\n", " ").replace(" && ", "\n").splitlines():
                line = re.sub(r"\s+#\s.*|\s\.\.\.$", "", line).strip()
                if line.startswith(WORDS):
                    yield page.name, " ".join(line.split())


LINES = sorted(set(command_lines()))


def as_click(app):
    if not isinstance(app, typer.Typer):
        plain, app = app, typer.Typer()
        app.command()(plain)
    return typer.main.get_command(app)


def parses_as_covo_rl(words: list[str]) -> None:
    """Click reads the words as it does when they are typed; nothing runs, files need not exist."""
    if not words or words[0] in ("COMMAND", "--install-completion"):
        return
    module, attribute, _ = COMMANDS[words[0]]
    if words[0] == "train":
        return parses_as_recipe(words[1:])
    if words[0] == "sft":
        return parses_as_cold_start(words[1:])
    if words[0] == "pretrain":
        return parses_as_pretraining(words[1:])
    if words[0] == "speech" and words[1].startswith("train-"):
        recipe = ROOT / "recipes" / f"{words[1].replace('-', '_')}.py"
        runpy.run_path(str(recipe))["parser"]().parse_args(words[2:])
        return
    command, words = as_click(getattr(import_module(module), attribute)), words[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context("covo-rl", list(words), resilient_parsing=len(words) < 2)
    if context.ignore_unknown_options:  # the rest are a run's
        return parses_as_recipe(context.args)
    assert not context.args, f"left over: {context.args}"


def parses_as_recipe(words: list[str]) -> None:
    if "--help" not in words:
        words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
        parse_options(words)


def parses_as_cold_start(words: list[str]) -> None:
    runpy.run_path(str(ROOT / "recipes" / "sft_cot.py"))["parser"]().parse_args(words)


def parses_as_pretraining(words: list[str]) -> None:
    runpy.run_path(str(ROOT / "recipes" / "pretrain.py"))["parser"]().parse_args(words)


def parses_on_machines(words: list[str]) -> None:
    """Options of Slurm, and hosts, are the reader's; what follows is the recipe's or covo-rl rollout-server's."""
    script = next(word for word in words if word.startswith("recipes/"))
    assert (ROOT / script).is_file(), f"{script} does not exist"
    words = words[words.index(script) + 1 :]
    role = Path(script).stem if script.endswith(".sbatch") else words[0]
    words = words if script.endswith(".sbatch") else words[2:]
    if role == "servers":
        return parses_as_covo_rl(["rollout-server", *words])
    assert role == "trainers" and (ROOT / "recipes" / "accelerate" / f"{words[0]}.yaml").is_file()
    parses_as_recipe(words[1:])


def parses(line: str) -> None:
    words = shlex.split(re.sub(r"\s\[.*\]", "", line))
    if words[0] in ("sbatch", "recipes/ssh/launch.sh"):
        return parses_on_machines(words)
    if words[:2] == ["accelerate", "launch"] and len(words) > 3:  # not where a sentence names it
        launch_command_parser().parse_args(words[2:])
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
        parses_as_cold_start(words[scripts[0] + 1 :])
    if scripts and words[scripts[0]] == "recipes/pretrain.py":
        parses_as_pretraining(words[scripts[0] + 1 :])


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_every_printed_command_line_parses(page, line):
    """finding 41: options of the commands in README and docs exist, and so do their scripts and targets."""
    try:
        parses(line)
    except (SystemExit, click.ClickException, argparse.ArgumentError) as error:
        pytest.fail(f"{page}: {line}: {getattr(error, 'message', error)}")


def command_flags(command) -> set[str]:
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags.union(*(command_flags(sub) for sub in getattr(command, "commands", {}).values()))


def known_flags() -> set[str]:
    """Every flag that something in this project takes, written with dashes."""
    flags = {f"--{name}" for name in (*option_names(), *vars(DuplexConfig()))}
    flags |= {"--full", "--config", "--help", "--install-completion"}
    flags |= {"--num_processes", "--mixed_precision", "--config_file", "--main_process_port"}  # of accelerate launch
    flags |= {"--cpu", "--train", "--validation", "--test"}  # of accelerate launch, and of python -m covo_rl.synth
    scripts = ("tests/**/*.py", "benchmarks/*.py", "recipes/*.py")
    for source in (path for pattern in scripts for path in ROOT.glob(pattern)):
        flags |= set(re.findall(r'(?:add_argument\(\s*|if )"(--[\w-]+)"', source.read_text(encoding="utf-8")))
    for word, (module, attribute, _) in COMMANDS.items():
        if word not in RECIPES:
            flags |= command_flags(as_click(getattr(import_module(module), attribute)))
    for recipe in ("sft_cot.py", "pretrain.py", *(path.name for path in (ROOT / "recipes").glob("train_*.py"))):
        flags |= set(runpy.run_path(str(ROOT / "recipes" / recipe))["parser"]()._option_string_actions)
    return {flag.replace("_", "-") for flag in flags}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_file_and_module_that_a_page_names_exists(page):
    """finding 41: a flag in running text, a link, a path of the project, a name in a module are held to the code."""
    text = page.read_text(encoding="utf-8")
    own = FENCE.sub("", text)
    flags = {flag.replace("_", "-") for code in re.findall(r"`([^`]+)`", own) for flag in re.findall(FLAG, code)}
    if page.name != "serving.md":  # its flags are vLLM's
        assert flags - known_flags() == set()
    for path in re.findall(r"\]\((?!http)([^)#]+)", own):
        assert (page.parent / path).exists(), f"a link to {path}, which does not exist"
    for path in re.findall(
        r"\b((?:covo_rl|recipes|tests|rewards|eval_sets|benchmarks|docs)/[\w/.-]*\w\.(?:py|yaml|md))", text
    ):
        assert (ROOT / path).exists(), f"{path} does not exist"


def test_every_name_in_running_code_is_in_the_code():
    """finding 41: `MAX_SAMPLES`, `n_missing`: a name with an underscore stands in the sources, or is a file there."""
    rooms = ("covo_rl", "rewards", "recipes", "eval_sets", "tests", "benchmarks")
    files = [path for room in rooms for path in (ROOT / room).rglob("*") if path != Path(__file__)]
    sources = [path for path in files if path.suffix in (".py", ".yaml", ".jinja", ".sh", ".sbatch")]
    words = {path.stem for path in files} | {"no_proxy"}  # of every HTTP client
    words = words.union(*(re.findall(r"\w+", path.read_text("utf-8")) for path in sources))
    for page in [page for page in PAGES if page.name != "serving.md"]:  # whose names are vLLM's
        code = " ".join(re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))))
        code = re.sub("_(NNNNN|NAME)", "", code)
        assert set(re.findall(r"\b(?!my_)[A-Za-z]+(?:_[A-Za-z]+)+\b", code)) - words == set(), page.name


def test_the_manifest_of_an_own_eval_set_loads_as_printed(tmp_path):
    """finding 41: the YAML of docs/evaluation.md."""
    from covo_rl.evaluate.sets import load_set

    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = [code for language, code in FENCE.findall(page) if language == "yaml" and "scorer:" in code]
    (tmp_path / "my_set.yaml").write_text(block, encoding="utf-8")
    assert load_set(str(tmp_path / "my_set.yaml")).name == "factory-sounds"


def test_the_defaults_that_pages_say_are_those_of_the_code():
    """finding 41: a number after "default" beside an option's name is that option's."""
    from covo_rl.config import Options
    from covo_rl.supervised.config import ColdStartConfig

    defaults = {**Options().flat(), "held_out": ColdStartConfig(data="x").held_out_share}
    said = [(page.name, name, number) for page in PAGES
            for name, number in re.findall(DEFAULTS, page.read_text(encoding="utf-8"))
            if name.replace("-", "_") in defaults]  # fmt: skip
    assert said, "no default is read any more"
    for page, name, number in said:
        assert float(number) == defaults[name.replace("-", "_")], f"{page}: {name} is said to be {number} by default"


def test_the_time_that_the_demo_takes_is_said_in_one_way():
    """finding 41: the Makefile said ten minutes, README three."""
    pages = [ROOT / "README.md", ROOT / "Makefile", ROOT / "recipes" / "grpo_mmau.py", ROOT / "recipes" / "README.md"]
    for page in pages:
        lines = [line for line in page.read_text(encoding="utf-8").splitlines() if "pretrain" not in line]
        times = {time for line in lines for time in re.findall(r"(\w+) (?:CPU )?minutes", line)}
        assert times - {"15"} == {"three"}, page


def test_what_ran_on_vllm_is_the_same_on_both_pages_and_has_a_release():
    """docs/models.md by model type, docs/serving.md by title, in the order of the registry."""
    models, serving = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("models.md", "serving.md"))
    rows = re.findall(r"^\| `(\w+)` \| (ran.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", models, re.MULTILINE)
    assert [row[0] for row in rows] == list(TINY_MODELS)
    cells = [cell for row in rows for cell in row[1:]]
    assert all(re.match(r"ran with .*\d+\.\d+\.\d+|read|not tried$", cell) for cell in cells), cells
    table = re.findall(r"^\| ([A-Z].*?) \| (.*?) \| (.*?) \|$", serving.split("## What was run")[0], re.MULTILINE)
    for (name, *_, merged, lora), (title, *there) in zip(rows, table, strict=True):
        for here, cell in zip((merged, lora), there, strict=True):
            assert here.startswith("ran") == cell.endswith("(ran)"), (name, title)
            assert bool(re.search(r": (no\b(?!t)|not in)", here)) == cell.startswith("no"), (name, title)
