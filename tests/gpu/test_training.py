"""Whole runs of the recipe on a device: every precision learns, exports what it trained, evaluates and resumes."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import train_cases
from accelerate import Accelerator
from typer.testing import CliRunner

from covo_rl import synth
from covo_rl.evaluate.cli import app
from covo_rl.models import load_family
from covo_rl.supervised import load_config
from covo_rl.supervised.stages import run_stages
from covo_rl.train.checkpoint import state
from covo_rl.train.guard import StoppedBySignal, StopSignals

RECIPE = Path(__file__).parents[2] / "recipes" / "grpo_mmau.py"
#: how accelerate is launched, options of the recipe, what it writes
RUNS = {
    "float32, LoRA": ("no", [], "adapter"),
    "bfloat16, LoRA": ("no", ["--dtype", "bfloat16", "--beta", "0.01", "--num-iterations", "2"], "adapter"),
    "float32 under bfloat16, full": (
        "bf16",
        ["--full", "--learning-rate", "3e-4", "--gradient-checkpointing"],
        "model",
    ),
    "4 bit, LoRA": ("no", ["--load-in-4bit", "true", "--dtype", "bfloat16"], "adapter"),
}
#: minutes on a CPU, whose own tests hold the same promises
pytestmark = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags for 96 rendered training rows and 33 held-out ones."""
    files = synth.render_set(tmp_path_factory.mktemp("questions"), seed=7, train=96, validation=11, test=33)
    train, test = files["train"], files["test"]
    return ["--data", train, "--audio-dir", train.parent, "--eval-data", test, "--eval-audio-dir", test.parent]


def train(*words) -> None:
    runpy.run_path(str(RECIPE))["main"]([str(word) for word in words])


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_the_recipe_learns_and_its_export_is_verified(device, launched, data, name, tmp_path):
    if name == "4 bit, LoRA":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'covo-rl[qlora]'")
    precision, words, exported = RUNS[name]
    launched(precision)
    train(*data, "--output", tmp_path / "run", "--max-steps", 10, "--prompts-per-step", 16, "--max-completion-length",
          32, "--evaluate", "false", *words)  # fmt: skip
    assert Accelerator().device.type == device.type
    steps = lines(tmp_path / "run")
    first, last = (sum(step["reward_total"] for step in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > first + 0.2, f"R_total {first:.2f} -> {last:.2f}: nothing was learned"
    highest = 1e-4 if name == "float32, LoRA" else 0.5
    assert all(step["sampling/sampling_logp_difference/max"] < highest for step in steps)
    assert all(step["grad_norm"] > 0 and step["skipped_steps"] == 0 for step in steps)
    verified = json.loads((tmp_path / "run" / exported / "verification.json").read_text())
    assert verified["ok"] and verified["update_kept"] > 0.5
    if name == "bfloat16, LoRA":
        evaluate(data, tmp_path, device)


def evaluate(data, folder: Path, device: torch.device) -> None:
    """`covo-rl eval` of what was exported, greedy, so that running it twice must say the same."""
    words = [
        "--data",
        data[5],
        "--audio-dir",
        data[7],
        "--set",
        "mmau-test-mini",
        "--model",
        "builtin:tiny",
        "--limit",
        16,
    ]
    words += ["--adapter", folder / "run" / "adapter", "--max-completion-length", 32, "--device", device.type]
    reports = []
    for name in ("first", "again"):
        done = CliRunner().invoke(app, [str(word) for word in [*words, "--no-plots", "--output", folder / name]])
        assert done.exit_code == 0, done.output
        reports.append([json.loads(line) for line in (folder / name / "rows.jsonl").read_text().splitlines()])
    assert len(reports[0]) == 16 and [r["id"] for r in reports[0]] == [r["id"] for r in reports[1]]


def test_supervised_stages_learn(device, launched, tmp_path):
    """Tagging, then the chain of thought, as recipes/sft_cot.py runs them."""
    launched()
    config = load_config(None, {
        "rows": 48, "output": str(tmp_path / "cold"), "prompt": {"instruction": "", "choice_style": "inline"},
        "tiny": {"vocab_size": 512, "encoder_width": 32, "decoder_width": 32, "decoder_layers": 2, "encoder_layers": 1,
                 "mel_bins": 40, "initializer_range": 0.1},
        "stages": [{"kind": "tagging", "steps": 30, "batch_size": 12, "learning_rate": 3e-3},
                   {"kind": "sft", "steps": 20, "batch_size": 12, "learning_rate": 5e-3}],
    })  # fmt: skip
    folder = run_stages(config)
    tagging, sft = json.loads((folder / "training_log.json").read_text())
    assert tagging["log"][-1]["fact_accuracy"] > 0.3, "of four values and more per fact"
    assert sft["log"][-1]["train_loss"] < 0.8 * sft["log"][0]["loss"]
    assert load_family(str(folder)).model_type == "covo_audio"


# -- resume ------------------------------------------------------------------------------------------------------------


class StopAtEveryUpdate(StopSignals):
    """A signal has always just arrived."""

    def __init__(self):
        self.received = "SIGTERM"


def resumed(folder: Path, **changes):
    """An undisturbed run, and one that is stopped after every update: trainers, and the rows of every step."""
    options = {"max_steps": 3, "num_iterations": 2, "beta": 0.05, "lr_scheduler_type": "cosine", **changes}
    undisturbed, _ = train_cases.run(train_cases.options(folder / "a", **options), accelerator=Accelerator())
    stops, made = 0, None
    while made is None:
        assert stops < 12, "the run does not get on"
        try:
            settings = train_cases.options(folder / "b", resume="auto", **options)
            made, _ = train_cases.run(settings, stop=StopAtEveryUpdate(), accelerator=Accelerator())
        except StoppedBySignal:
            stops += 1
    assert stops == 6
    return undisturbed, made


def test_a_resume_promises_order_seeds_counters_and_weights(device, launched, tmp_path, monkeypatch):
    """Whatever the kernels round. The weights that a stop saves are those that the resume starts from, bit by bit."""
    launched()
    saved, loaded = [], []
    original = state.load_weights

    def note(model, tensors):
        original(model, tensors)
        saved.append(dict(tensors))
        loaded.append(state.weights(model))

    monkeypatch.setattr(state, "load_weights", note)
    undisturbed, made = resumed(tmp_path)
    assert made.device.type == device.type
    assert len(saved) == 6
    for before, after in zip(saved, loaded, strict=True):
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("step", "optimizer_steps", "sampler", "guard", "skipped_rows"):
        assert made.state_dict()[name] == undisturbed.state_dict()[name], name
    ours, theirs = train_cases.metrics(tmp_path / "b"), train_cases.metrics(tmp_path / "a")
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[name] == b[name] for name in ("step", "epoch", "learning_rate"))
    # the first batch was sampled before anything could differ, and is kept by the checkpoint in its middle
    assert ours[0]["reward_total"] == theirs[0]["reward_total"]


def test_with_deterministic_kernels_a_resume_repeats_every_bit(device, launched, repeatable, tmp_path):
    launched()
    undisturbed, made = resumed(tmp_path)
    assert train_cases.metrics(tmp_path / "b") == train_cases.metrics(tmp_path / "a")
    ours, theirs = dict(made.policy.named_parameters()), dict(undisturbed.policy.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
