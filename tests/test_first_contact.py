"""First contact: each wrong use ends in one message that says what to do, before any model is loaded."""

from __future__ import annotations

import io
import json
import runpy
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from covo_rl.cli import COMMANDS, main, usage
from covo_rl.config import ConfigError, parse_options

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes" / "configs"


def run(word: str, *words):
    """(exit code, everything said) of `covo-rl WORD ...`, in this process; an exception is a failure of the test."""
    module, attribute, _ = COMMANDS[word]
    app = getattr(import_module(module), attribute)
    if not isinstance(app, typer.Typer):
        plain, app = app, typer.Typer(add_completion=False)
        app.command()(plain)
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def no_model(monkeypatch):
    """Loading weights is a failure."""
    import covo_rl.models.base

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(covo_rl.models.base.AudioFamily, "load", classmethod(load))


FILES = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "half": lambda path: path.write_text('{"id": "a", "question": "wh'),
    "a number": lambda path: path.write_text("3"),
}
#: commands with one FILE (of rows, a configuration, or a folder) that is wrong
USES = {
    "data check": ["data", "check", "FILE.json"],
    "data convert": ["data", "convert", "FILE.json", "OUT.json", "--to", "mmau"],
    "data profile": ["data", "profile", "FILE.json", "--output", "OUT"],
    "eval data": ["eval", "--set", "mmar", "--data", "FILE.json", "--model", "builtin:tiny", "--output", "OUT"],
    "eval set": ["eval", "--set", "FILE.yaml", "--data", "x", "--model", "builtin:tiny", "--output", "OUT"],
    "eval adapter": ["eval", "--set", "builtin", "--model", "builtin:tiny", "--adapter", "FILE", "--output", "OUT"],
    "eval model": ["eval", "--set", "builtin", "--model", "./FILE", "--output", "OUT"],
    "eval predictions": ["eval", "--set", "builtin", "--predictions", "FILE.json", "--output", "OUT"],
    "eval compare": ["eval", "compare", "FILE", "FILE"],
    "rewards score": ["rewards", "score", "--input", "FILE.jsonl", "--output", "OUT.jsonl"],
    "rewards try": ["rewards", "try", "--completion", "x", "--row", "FILE.json"],
    "rewards check": ["rewards", "check", "./FILE.py:score"],
    "rewards check rows": ["rewards", "check", "accuracy", "--rows", "FILE.jsonl"],
    "export": ["export", "FILE", "--adapter", "OUT"],
    "serve-check": ["serve-check", "FILE"],
    "report": ["report", "FILE"],
    "doctor": ["doctor", "--config", "FILE.yaml"],
}


#: damaged YAML has tests of its own
CASES = [
    (use, kind) for use in USES for kind in FILES if not (use in ("eval set", "doctor") and kind in ("binary", "half"))
]


@pytest.mark.parametrize(("use", "content"), CASES, ids=" / ".join)
def test_a_wrong_file_is_one_message_for_every_command(use, content, tmp_path, monkeypatch, no_model):
    """finding 40: whatever is wrong with the file, no traceback, no page of usage, nothing written."""
    monkeypatch.chdir(tmp_path)
    words = USES[use]
    name = next(word for word in words if "FILE" in word).removeprefix("./").partition(":")[0]
    FILES[content](tmp_path / name)
    code, said = run(*words)
    if use == "rewards score" and content == "empty":
        assert "0 rows" in said
        return
    if use == "rewards check rows" and content == "empty":
        return
    assert code in (1, 2), said
    assert "FILE" in said or "mmar" in said, said
    assert "Traceback" not in said and len(said) < 1500, said
    assert not list(tmp_path.glob("OUT*"))


def test_an_unknown_command_and_usage():
    """finding 40: the commands that exist are listed, in lines of a terminal."""
    with pytest.raises(SystemExit) as error:
        main(["evaluate"])
    assert "there is no command 'evaluate'" in str(error.value)
    assert max(map(len, usage().splitlines())) <= 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: ten", "max_steps 'ten' a whole number"),
        ("max_steps: 1.5", "max_steps 1.5 a whole number"),
        ("max_steps: true", "max_steps True a whole number"),
        ("max_steps:", "max_steps"),
        ("learning_rate: fast", "learning_rate 'fast' number"),
        ("lora: maybe", "lora 'maybe' true or false"),
        ("modules_to_save: audio_adapter", "modules_to_save 'audio_adapter' a list"),
        ("output: 2024", "output 2024 text in quotes"),
        ("1: 2", "unknown option 1"),
        ("env: 3", "env a mapping"),
    ],
)  # fmt: skip
def test_values_of_another_type_in_yaml(text, message, tmp_path):
    """finding 40: `max_steps: ten` was a page of usage, other types tracebacks later on."""
    (tmp_path / "c.yaml").write_text(f"{text}\nmax_stepz: 3\n")
    with pytest.raises(ConfigError) as error:
        parse_options(["--config", str(tmp_path / "c.yaml")])
    assert all(part in str(error.value) for part in [*message.split(), "c.yaml: "])
    assert "did you mean max_steps?" in str(error.value), "all problems come at once"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-steps", "ten"], "--max-steps: invalid int value: 'ten'"),
        (["--max-steps"], "--max-steps: expected one argument"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--lora", "maybe"], "--lora: Truthy value expected"),
        (["stray"], "'stray'"),
        (["--config"], "--config needs a file"),
        (["--config=nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)  # fmt: skip
def test_values_of_another_type_in_flags(words, message):
    """finding 40: one message where argparse prints every option."""
    with pytest.raises(ConfigError) as error:
        parse_options(words)
    assert message in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards: {accuracy: high}", "rewards accuracy high"),
        ("dtype: float8", "dtype 'float8': choose auto, float32 or bfloat16"),
        ("choice_style: ABC", "choice_style 'ABC': choose letters, lines or inline"),
    ],
)  # fmt: skip
def test_values_that_are_no_choice(text, message, tmp_path):
    """finding 40: choices are checked in YAML as they are in flags."""
    (tmp_path / "c.yaml").write_text(f"{text}\n")
    with pytest.raises(ConfigError) as error:
        options = parse_options(["--config", str(tmp_path / "c.yaml")])
        from covo_rl.rewards import components

        components(options.reward.rewards)
    assert all(part in str(error.value) for part in message.split())


def test_numbers_in_yaml_that_are_text_are_still_read(tmp_path):
    """finding 40: YAML 1.1 reads 1e-5 as text; the check of types must not refuse it."""
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-5\nepsilon_high: null\nrewards: {accuracy: 1, format: 0.5}\n")
    options = parse_options([f"--config={tmp_path / 'c.yaml'}"])
    assert options.train.learning_rate == 1e-5 and options.loss.epsilon_high is None


def recipe():
    return runpy.run_path(str(ROOT / "recipes" / "grpo_mmau.py"))


def options_of(*words):
    return parse_options(recipe()["with_defaults"]([str(word) for word in words]))


def test_a_model_of_ones_own_never_takes_the_demo_s_settings(tmp_path):
    """finding 40: `--model X` took learning rate 1e-3, 48 tokens, no instruction and inline choices."""
    demo = options_of()
    for words in (["--model", "PATH"], ["--model=PATH", "--data", "q.json"], ["--seed", "1", "--model", "org/name"]):
        mine = options_of(*words)
        assert mine.train.learning_rate == 1e-6 and mine.rollout.max_completion_length == 1024
        assert mine.prompt.choice_style == "letters" and "<think>" in mine.prompt.instruction
        assert mine.train.output != demo.train.output
        real = parse_options(["--config", str(CONFIGS / "covo_audio_7b_lora.yaml")])
        same = {"lora_r", "lora_alpha", "beta", "prompts_per_step", "micro_batch_prompts", "lr_scheduler_type",
                "warmup_steps", "max_steps", "gradient_checkpointing", "loss_type", "num_generations"}  # fmt: skip
        assert {name: mine.flat()[name] for name in same} == {name: real.flat()[name] for name in same}
    assert options_of("--model", "x", "--learning-rate", "2e-4").train.learning_rate == 2e-4


def test_shipped_models_and_a_configuration_keep_theirs():
    """finding 40: the demo is as it was."""
    assert (options_of().train.learning_rate, options_of().rollout.max_completion_length) == (1e-3, 48)
    assert options_of("--model", "builtin:tiny").prompt.instruction == ""
    zero = options_of("--model", "builtin:tiny_zero")
    assert zero.model.model == "builtin:tiny_zero" and zero.train.output == "runs/tiny_zero"
    given = options_of("--config", CONFIGS / "tiny.yaml", "--model", "x")
    assert given.train.learning_rate == 1e-3 and given.model.model == "x"


def test_a_model_keeps_the_wording_that_it_was_taught(tmp_path):
    """finding 40: a cold-started folder says its prompt in prompt.yaml; flags win, damage is one message."""
    (tmp_path / "prompt.yaml").write_text("system_prompt: null\ninstruction: ''\nchoice_style: lines\n")
    taught = options_of("--model", tmp_path)
    assert (taught.prompt.instruction, taught.prompt.choice_style) == ("", "lines")
    assert options_of("--model", tmp_path, "--choice_style", "letters").prompt.choice_style == "letters"
    (tmp_path / "prompt.yaml").write_text("choice_stile: lines\n")
    with pytest.raises(ConfigError, match="unknown option 'choice_stile'; did you mean choice_style"):
        options_of("--model", tmp_path)


TRAIN = {
    "reward name": (["--rewards", "accurcy,format"], "there is no reward 'accurcy'; did you mean 'accuracy'?"),
    "reward file": (["--rewards", "./brevty.py:brevity"], "did you mean brevity.py?"),
    "reward function": (["--rewards", "./brevity.py:brevty"], "has no 'brevty'; it has brevity"),
    "reward argument": (["--rewards", "thinking(use_golt=False)"], "no argument 'use_golt'; did you mean 'use_gold'?"),
    "reward without .py": (["--rewards", "./brevity:brevity"], "a file is named with its .py"),
    "reward that raises": (["--rewards", "./raises.py:f"], "raises ZeroDivisionError while it is imported"),
    "reward of another signature": (["--rewards", "./signature.py:signature"], "signature"),
    "gate": (["--rewards", "format", "--reward_gate", "accuracy"], "reward_gate 'accuracy' is not among the rewards"),
    "judge": (["--judge", "gpt-4"], "judge 'gpt-4': write openai:MODEL@URL, transformers:PATH or command:PROGRAM"),
    "model folder": (["--model", "./nowhere"], "model './nowhere': no such folder"),
    "model without config": (["--model", "./empty"], "a model folder has a config.json; found []"),
    "a file as model": (["--model", "./brevity.py"], "give the folder that holds config.json"),
    "an adapter as model": (["--model", "./lora"], "is a PEFT adapter: give it as adapter, and its base as model"),
    "a hub name that cannot be": (["--model", "my models/a b"], "no name that the Hugging Face hub could have"),
    "a run as model": (["--model", "./run_lora"], "covo-rl export run_lora --merged DIR"),
    "a full run as model": (["--model", "./run_full"], "did you mean run_full/model?"),
    "a run as adapter": (["--adapter", "./run_lora"], "covo-rl export run_lora --adapter DIR"),
    "adapter with a typo": (["--adapter", "./loora"], "did you mean lora?"),
    "data with a typo": (["--data", "row.json"], "did you mean rows.json?"),
    "audio folder with a typo": (["--data", "rows.json", "--audio-dir", "emty"], "; did you mean empty?"),
    "a file as audio folder": (["--data", "rows.json", "--audio-dir", "rows.json"], "rows.json is a file"),
    "configuration with a typo": (["--config", "tiney.yaml"], "did you mean tiny.yaml?"),
    "a run as configuration": (["--config", "run_lora"], "did you mean run_lora/config.yaml?"),
    "one dash": (["-seed", "3"], "options start with --"),
    "another family": (["--model", "./bert"], "model_type 'bert' has no family; there are covo_audio"),
    "half a config": (["--model", "./half"], "half"),
    "shipped model": (["--model", "builtin:tny"], "did you mean 'tiny'?"),
    "adapter": (["--adapter", "./empty"], "a PEFT adapter folder has an adapter_config.json"),
    "data": (["--data", "nowhere.json"], "nowhere.json"),
    "4 bit": (["--load_in_4bit", "true", "--full"], "parameters cannot train in 4 bits: use --lora"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("empty", "lora", "bert", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "brevity.py").write_text(
        "def brevity(completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    (tmp_path / "signature.py").write_text("def signature(texts):\n    return 3\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "half" / "config.json").write_text('{"model_type": "cov')
    (tmp_path / "run_lora" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run_lora" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "run_full" / "model").mkdir(parents=True)
    (tmp_path / "run_full" / "model" / "config.json").write_text("{}")
    (tmp_path / "tiny.yaml").write_text("seed: 1\n")
    row = {"id": "a", "audio": "a.wav", "question": "What?", "choices": ["x", "y"], "answer": "x"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TRAIN)
def test_a_wrong_run_stops_with_one_message_before_a_model_is_loaded(name, here, no_model):
    """finding 40: a wrong reward name was noticed after the model was loaded."""
    words, message = TRAIN[name]
    with pytest.raises(SystemExit) as error:
        recipe()["main"]([*words, "--dry-run", "--output", str(here / "run")])
    assert message in str(error.value.code)
    assert len(str(error.value.code)) < 1200
    assert not (here / "run").exists()


def test_a_model_that_only_the_hub_has(monkeypatch, no_model):
    """finding 40: half a minute of retries, then advice about transformers; now one request and what to do."""
    import huggingface_hub

    from covo_rl.models import model_config

    class Hub:
        def model_info(self, name, timeout):
            raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match=r"model 'someone/NoSuchModel'.*ConnectionError: Name or.*hf download"):
        model_config("someone/NoSuchModel")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="the hub is switched off"):
        model_config("someone/NoSuchModel")


def cut(name):
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


DAMAGE = {
    "weights": (cut("model.safetensors"), "its weights cannot be read"),
    "weights that are a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://"),
        "cannot be read",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "tokenizer": (cut("tokenizer.json"), "does not load (JSONDecodeError"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "does not load (ValueError"),
    "config": (cut("config.json"), "config.json is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is a list"),
    "an impossible size": (
        lambda f: (f / "config.json").write_text('{"model_type": "covo_audio", "adapter_downsample": 3}'),
        "adapter_downsample=3 is not a power of two",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_folder_is_one_message(name, tmp_path):
    """finding 40: half a download, for example."""
    from covo_rl.models import load_family
    from covo_rl.types import UserError

    folder = shutil.copytree(ROOT / "checkpoints" / "tiny", tmp_path / "model")
    break_it, message = DAMAGE[name]
    break_it(folder)
    with pytest.raises((UserError, OSError)) as error:
        load_family(str(folder))
    assert message in str(error.value) and str(folder) in str(error.value)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "gpu"])
def test_a_device_that_is_not_there(device, tmp_path, monkeypatch, no_model):
    """finding 40: `eval --device cuda` without a GPU was a traceback after loading."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--set", "builtin", "--model", "builtin:tiny", "--output", tmp_path / "out", "--device", device]
    code, said = run("eval", *words)
    assert code == 2 and f"--device: device {'gpu' and repr(device) if device == 'gpu' else device}" in said
    assert not (tmp_path / "out").exists()
    code, said = run("doctor", "--config", CONFIGS / "tiny.yaml", "--device", device)
    assert code == 2 and "device" in said


@pytest.mark.parametrize(("name", "size"), [("covo_audio_7b_lora.yaml", 2), ("covo_audio_7b_full.yaml", 4)])
def test_the_doctor_asks_no_hub(name, size, monkeypatch):
    """finding 40: `doctor --config 7b` needs no weights, and no network either."""
    import huggingface_hub

    from covo_rl.run.doctor import plan_options

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", asked)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", asked)
    made = plan_options(parse_options(["--config", str(CONFIGS / name)]))
    assert 7.5 * 2**30 < made.memory["weights"] / size < 8.5 * 2**30  # 8.4 B parameters; what trains whole is float32


def test_the_doctor_counts_what_the_options_train():
    """finding 40: LoRA on all seven linear layers was assumed, whatever lora_target_modules said."""
    from covo_rl.run.doctor import plan_options

    def trained(*words):
        return plan_options(parse_options(["--config", str(CONFIGS / "tiny.yaml"), *words]), seconds=3.0).trainable

    every = trained()
    # width 128, 4 layers, rank 16: query takes 128 and gives 128
    assert trained("--lora-target-modules", r"llm\.model\..*\.q_proj") == 4 * 16 * (128 + 128)
    assert every == 155_648  # README: 156 thousand
    assert trained("--use-dora", "true") > every
    assert trained("--modules-to-save", "audio_adapter") > every


def test_scoring_a_run_s_rollouts_gives_the_run_s_figures(tmp_path):
    """finding 40: choices and facts were not in the record, and `rewards` was overwritten."""
    from covo_rl.algo.advantage import Advantages
    from covo_rl.config import RewardConfig
    from covo_rl.records.steps import rollout_rows
    from covo_rl.rewards import score
    from covo_rl.rewards.columns import example_from_row, group_from_completions

    rows = [
        {"id": f"r{i}", "question": "What makes the sound?", "choices": ["bell", "knock"], "answer": "knock",
         "facts": {"source": "knock"}, "fact_lexicon": {"source": ["bell", "knock"]}}
        for i in range(3)
    ]  # fmt: skip
    texts = ["<think>I hear a knock on wood.</think><answer>B</answer>", "<answer>(B) knock</answer>", "knock",
             "<think>It rings, a bell.</think><answer>A</answer>"]  # fmt: skip
    groups = [group_from_completions(example_from_row(row), texts) for row in rows]
    table = score(groups, RewardConfig())
    zeros_PG = table.rewards_PG * 0
    record = rollout_rows(groups, table, Advantages(zeros_PG, zeros_PG[:, 0] > 1, table.rewards_PG, {}))
    file, out = tmp_path / "step_00001.jsonl", tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in record))
    code, said = run("rewards", "score", "--input", file, "--output", out)
    assert code == 0 and "12 rows had scores, which are kept; 0 of them differ" in said
    for row, scored in zip(record, map(json.loads, out.read_text().splitlines()), strict=True):
        assert scored["rewards"] == row["rewards"] == scored["rescored_rewards"]
        assert scored["reward_total"] == pytest.approx(scored["rescored_reward_total"])
    code, said = run("rewards", "score", "--rewards", "format(pattern='think')", "--input", file, "--output", out)
    for row in record:
        del row["choices"]
    file.write_text("".join(json.dumps(row) + "\n" for row in record))
    code, said = run("rewards", "score", "--input", file, "--output", out)
    assert code == 2 and "without the choices and facts" in said


@pytest.mark.parametrize("width", [200, 140, 100, 80, 60])
def test_the_bar_shows_how_far_it_is_at_every_width(width, monkeypatch):
    """finding 40: below 140 columns neither count nor time was shown."""
    from covo_rl.records import console

    screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(console, "console", screen)
    with console.ProgressDisplay("GRPO", 120, steps=5) as display:
        display.update(7, "R 2.15  accuracy 0.27  format 0.70  consistency 0.50  thinking 0.60  length 31  same 12.5%")
        display.bar.refresh()
    shown = screen.file.getvalue()
    assert "7/120" in shown and "R 2.15" in shown and ":--" in shown


def test_without_a_terminal_the_same_stands_in_lines(monkeypatch):
    """finding 40: a log file shows the first step, every fifth, and the last."""
    from covo_rl.records import console

    screen = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(console, "console", screen)
    with console.ProgressDisplay("GRPO", 7, steps=5) as display:
        for step in range(1, 8):
            display.update(step, "R 2.15")
    lines = [line for line in screen.file.getvalue().splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/7", "5/7", "7/7"]


def test_an_export_is_refused_before_the_model_is_loaded(tmp_path, no_model):
    """finding 40: an unknown precision, and a folder that exists."""
    code, said = run("export", ROOT / "checkpoints" / "tiny", "--merged", tmp_path / "new", "--dtype", "float8")
    assert code == 1 and "dtype 'float8': there are auto, float32" in said
    code, said = run("export", ROOT / "checkpoints" / "tiny", "--merged", tmp_path)
    assert code == 1 and "exists: give another folder, or --replace it" in said


def test_a_benchmark_says_what_it_cannot_run_on(monkeypatch):
    """finding 40: device and precision of `bench grpo`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = run("bench", "grpo", "--device", "cuda")
    assert code == 2 and "device cuda: this machine has no cuda device" in said
    code, said = run("bench", "grpo", "--dtype", "float8")
    assert code == 2 and "dtype 'float8'" in said


HELP = [[word] for word in COMMANDS if word != "train"]
HELP += [
    ["eval", "compare"],
    ["data", "check"],
    ["data", "convert"],
    ["data", "profile"],
    ["data", "build"],
    ["data", "inspect"],
    ["rewards", "try"],
]
HELP += [["rewards", "check"], ["rewards", "score"], ["rewards", "list"], ["bench", "grpo"]]


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_of_every_command_fits_a_terminal(words, monkeypatch):
    """finding 40: no line is wider than the terminal, and each says what the command does."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    code, said = run(*words, "--help")
    assert code == 0 and "Usage" in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_folder_without_permission_is_one_message(tmp_path, monkeypatch):
    """finding 40: files that may not be read or written."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "rows.jsonl")

    (tmp_path / "rows.jsonl").write_text('{"completion": "x", "answer": "x"}\n')
    import covo_rl.rewards.cli

    monkeypatch.setattr(covo_rl.rewards.cli, "write_atomically", refuse)
    code, said = run("rewards", "score", "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl")
    assert code == 2 and "Permission denied: 'rows.jsonl'" in said


def test_a_command_with_a_typo_is_answered_with_the_nearest():
    """finding 40: as for options, the name that was meant."""
    with pytest.raises(SystemExit, match="no command 'exprt'; did you mean 'export'"):
        main(["exprt", "x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--confg", "a.yaml"], "unknown option 'confg'; did you mean config?"),
     (["--completion-colum", "c"], "did you mean completion-column?"),
     (["--config", "a.yml", "--held_out=0.2"], "a.yml: no such file (looked in {here}); did you mean a.yaml?")],
)  # fmt: skip
def test_the_cold_start_reads_flags_as_grpo_does(words, message, tmp_path, monkeypatch, capsys):
    """finding 42: a flag cut short was read as another, underscores were refused, a typo had no suggestion."""
    (tmp_path / "a.yaml").write_text("rows: 5\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "recipes" / "sft_cot.py"))["main"](words)
    assert message.format(here=tmp_path) in capsys.readouterr().err


def test_attention_without_its_package_is_one_message(monkeypatch):
    """finding 40: --attn_implementation flash_attention_2 on a laptop was an ImportError's traceback."""
    from covo_rl.models import ModelError, load_family

    with pytest.raises(ModelError, match=r"does not load \(ImportError: FlashAttention2"):
        load_family(str(ROOT / "checkpoints" / "tiny"), attn_implementation="flash_attention_2")
