"""The command line itself: groups, help that is true, completion, `covo-rl models`, `covo-rl sft`."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from covo_rl import cli
from covo_rl.config import Options, rooms
from covo_rl.resolve import find, read_yaml
from covo_rl.run.commands.completion import SHELLS, UnknownShell, completion_script, install_completion, named_shell
from covo_rl.run.commands.models import models_command
from covo_rl.run.commands.options_page import CONFIGS, FIRST, options_page, shown_value

ROOT = Path(__file__).parent.parent
TINY = ROOT / "checkpoints" / "tiny"


def test_every_command_stands_in_one_group_with_an_example_of_it():
    listed = [word for words in cli.GROUPS.values() for word in words]
    assert sorted(listed) == sorted(cli.COMMANDS)
    for word, example in [pair for words in cli.GROUPS.values() for pair in words.items()]:
        words = shlex.split(example)
        assert words[0] == "covo-rl" and (words[1] == word or word == "completion")
    lines = cli.usage().splitlines()
    assert max(map(len, lines)) <= 80 and all(group in lines for group in cli.GROUPS)


def test_the_help_pages_start_no_torch():
    pages = (["--help"], ["train", "--help"], ["train", "--help", "short"], ["watch", "--help"], ["models", "--help"])
    for words in pages:
        code = f"""import sys
from covo_rl.cli import main
try:
    main({words})
finally:
    assert "torch" not in sys.modules"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "AssertionError" not in done.stderr and "sage: covo-rl" in done.stdout, done.stderr


def options_of(page):
    """Option -> (default, explanation) of a page, unwrapped."""
    text = re.sub(r"\n {33,}", " ", page)
    lines = re.finditer(r"^  --([a-z][\w-]*)(?: (\S+))?  +(\S.*)$", text, re.MULTILINE)
    return {line[1].replace("-", "_"): (line[2], line[3]) for line in lines if line[1] != "help"}


def test_the_page_of_train_says_every_default_as_the_dataclasses_have_it():
    page = options_page(["--help"])
    assert max(map(len, page.splitlines())) <= 80
    shown, defaults = options_of(page), Options().flat()
    assert list(shown) == list(defaults)
    for name, (value, text) in shown.items():
        expected = shown_value(defaults[name])
        said = value or re.search(r"; default: (.*?)(?: \(|\ \[|$)", text)[1]
        assert said == expected, name
        assert defaults[name] is not None or value == "-", name
    assert defaults["learning_rate"] == float(shown["learning_rate"][0]) == 1e-6


def test_the_page_says_what_the_configurations_say_instead():
    shown, defaults = options_of(options_page()), Options().flat()
    for config in CONFIGS:
        for name, value in read_yaml(find("recipes", f"configs/{config}.yaml")).items():
            bracket = re.search(r"\[([^]]*)\]$", shown[name][1])
            part = [
                p for p in (bracket[1] if bracket else "").split("; ") if config in p.rpartition(": ")[2].split(", ")
            ]
            same = value == (dict.fromkeys(defaults[name].split(","), 1.0) if name == "rewards" else defaults[name])
            if name == "model" or same:
                assert part == [], name
            else:
                assert [text.rpartition(": ")[0] for text in part] == [shown_value(value)], name


def test_the_short_page_and_those_of_a_room():
    short = options_page(["--help", "short"])
    assert tuple(options_of(short)) == FIRST and all(f"--help {room} " in short for room in rooms())
    for room, kind in rooms().items():
        assert list(options_of(options_page(["--seed", "1", "--help", room]))) == [f.name for f in fields(kind)]
    with pytest.raises(Exception, match="--help nope: there are short, model"):
        options_page(["--help", "nope"])


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    return cli.all_words()


@pytest.fixture(scope="module")
def bash(words, tmp_path_factory):
    """words typed -> what a Tab offers."""
    script = tmp_path_factory.mktemp("bash") / "covo-rl.bash"
    script.write_text(completion_script("bash", words))

    def complete(*typed):
        code = (f'source {shlex.quote(str(script))}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _covo_rl; '
                'printf "%s\\n" "${COMPREPLY[@]}"')  # fmt: skip
        done = subprocess.run(["bash", "--norc", "-uc", code, "bash", *typed], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["covo-rl", ""], list(cli.COMMANDS)),
        (["covo-rl", "tr"], ["train"]),
        (["covo-rl", "--ver"], ["--version"]),
        (["covo-rl", "data", ""], ["build", "check", "convert", "inspect", "profile", "simulate-duplex"]),
        (["covo-rl", "data", "check", "--against-a"], ["--against-audio-dir"]),
        (["covo-rl", "train", "--max-st"], ["--max-steps"]),
        (["covo-rl", "train", "--seed", "1", "--dtype", "b"], ["bfloat16"]),
        (["covo-rl", "train", "--lora", ""], ["true", "false"]),
        (["covo-rl", "train", "--help", "r"], ["rollout", "reward"]),
        (["covo-rl", "train", "--config", ""], []),  # files, by bash itself
        (["covo-rl", "report", "ru"], []),
        (["covo-rl", "eval", "--dtype", "float"], ["float32", "float16"]),
        (["covo-rl", "sft", "--held"], ["--held-out"]),
        (["covo-rl", "--install-completion", "z"], ["zsh"]),
        (["covo-rl", "watch", "runs/x; touch $(echo /tmp/x)", "--onc"], ["--once"]),
    ],
)
def test_bash_completes(bash, typed, offered):
    assert sorted(bash(*typed)) == sorted(offered)


def test_every_option_of_training_is_completed(bash):
    names = {f"--{name.replace('_', '-')}" for name in Options().flat()}
    assert set(bash("covo-rl", "train", "--")) == names | {"--config", "--full", "--help"}


def test_scripts_of_all_shells_hold_every_command(words):
    for shell in SHELLS:
        text = completion_script(shell, words)
        assert all(word in text for word in cli.COMMANDS) and "max-steps" in text
    assert "'" not in completion_script("fish", words).replace("\\'", "").split("-d '")[1].split("'")[0]


def test_a_script_is_written_where_the_shell_looks(words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    places = {shell: install_completion(words, shell)[0].relative_to(tmp_path) for shell in SHELLS}
    assert {shell: str(path) for shell, path in places.items()} == {
        "bash": "share/bash-completion/completions/covo-rl", "zsh": "share/zsh/site-functions/_covo-rl",
        "fish": "config/fish/completions/covo-rl.fish",
    }  # fmt: skip
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert named_shell(None) == "fish"
    for wrong in ("/bin/tcsh", ""):
        monkeypatch.setenv("SHELL", wrong)
        with pytest.raises(UnknownShell, match="name one of bash, zsh, fish"):
            named_shell(None)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    import covo_rl.models.base

    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(covo_rl.models.base.AudioFamily, "load", classmethod(load))


def said(capsys, path=None):
    models_command(path)
    return " ".join(capsys.readouterr().out.split())


def test_what_families_and_checkpoints_there_are(capsys):
    text = said(capsys)
    assert "covo_audio" in text and "qwen2_audio" in text and "builtin:tiny " in text and "builtin:tiny_zero" in text


def test_what_a_model_folder_is(capsys, no_weights):
    text = said(capsys, "builtin:tiny")
    assert "family covo_audio" in text and "parameters 1,480,352: encoder 288,960" in text and "4 layers" in text
    assert "LoRA trains 155,648" in text and "106 tensors, 1,480,352 in F16; 1 of 1 files" in text
    assert "its prompt.yaml" in text


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def resized(folder, **values):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = {name: {**config[name], **value} if isinstance(value, dict) else value for name, value in values.items()}
    (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}})
DAMAGE = {
    "a missing tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json or tokenizer.model"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it has no weights"),
    "a missing shard": (lambda f: (f / "model.safetensors.index.json").write_text(INDEX), "model-1.safetensors is"),
    "no config": (lambda f: (f / "config.json").unlink(), "a model folder has a config.json"),
    "another family": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "'bert' has no family"),
    "no name of a family": (lambda f: (f / "config.json").write_text('{"model_type": ["x"]}'), "has no family"),
    "endless brackets": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "a word for a part": (lambda f: resized(f, encoder_config="x"), "does not load (TypeError"),
    "a word for a size": (lambda f: resized(f, llm_config={"hidden_size": "x"}), "'hidden_size' expected int"),
    "no heads": (lambda f: resized(f, llm_config={"num_attention_heads": 0}), "does not load (ZeroDivisionError"),
    "a size below nothing": (lambda f: resized(f, llm_config={"hidden_size": -1}), "negative dimension"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_missing_is_said(name, tmp_path, capsys, no_weights):
    folder = shutil.copytree(TINY, tmp_path / "model")
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(SystemExit) as stop:
        models_command(str(folder))
    assert stop.value.code == 1 and message in capsys.readouterr().err


def test_adapters_and_runs_are_told_apart(tmp_path, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps(
            {"base_model_name_or_path": "org/base\x1b[31m", "peft_type": "LORA", "r": 4, "target_modules": ["q"]}
        )
    )
    with pytest.raises(SystemExit):
        models_command(str(tmp_path / "lora"))
    out = capsys.readouterr()
    assert (
        "PEFT adapter" in out.out
        and "rank 4" in out.out
        and "no weights" in out.err
        and "\x1b" not in out.out + out.err
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: builtin:tiny\nmax_steps: 9\n")
    (run / "environment.json").write_text("{}")
    text = said(capsys, str(run))
    assert "a run" in text and "step 0 of 9" in text and f"covo-rl watch {run}" in text


# -- sft ---------------------------------------------------------------------------------------------------------------


def test_sft_runs_its_recipe(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", "--config", "nowhere.yaml"])
    assert stop.value.code == 1 and "nowhere.yaml: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", "--confg", "x"])
    assert "did you mean config?" in capsys.readouterr().err


def test_rows_of_ones_own_are_an_evaluation_set(tmp_path):
    from covo_rl.data import load_examples
    from covo_rl.evaluate.inputs import read_inputs
    from covo_rl.evaluate.sets import load_set
    from covo_rl.synth import builtin_questions

    path = builtin_questions()["test"]
    inputs = read_inputs(load_set("own"), path, path.parent, limit=3)
    assert [e.id for e in inputs.examples] == [e.id for e in load_examples(str(path))[:3]]
