"""What a user reads of a run: its own lines, no library's mumbling, and every warning of the user's code."""

import logging
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from covo_rl.cli import command_app
from covo_rl.data import noise
from covo_rl.train.schedule import advance_schedule, place_schedule, schedule_of

ROOT = Path(__file__).parent.parent
#: what libraries print where nobody quiets them
NOISE = (
    r"it/s\]", r"\d+%\|", r"Loading weights", r"Writing model shards", r"Loading checkpoint", r"FutureWarning",
    r"DeprecationWarning", r"UserWarning", r"Setting `pad_token", r"generation flags are not valid", r"lr_scheduler",
    r"optimizer\.step\(\)", r"base_model_name_or_path", r"were not passed to `accelerate launch`", r"warnings\.warn",
    r"\[rank\d\]:", r"Gloo", r"TOKENIZERS_PARALLELISM", r"^W\d{4} ", r"Some weights of", r"newly initialized",
    r"torch_dtype", r"NCCL", r"Sliding Window", r"attention implementation",
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(standard output, standard error, run folder) of the demo over two steps."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "mine.py").write_text(
        "import warnings\n"
        "def score(completions, **columns):\n"
        "    warnings.warn('mine is deprecated \\x1b[31m', FutureWarning)\n"
        "    return [0.25 + 0.5 * (i % 2) for i, _ in enumerate(completions)]\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}

    words = ("train --max-steps 2 --prompts-per-step 2 --num-generations 4 --limit 16 --eval-limit 8 "
             "--check-rewards false --rewards accuracy,format,./mine.py:score --output")  # fmt: skip
    code = "from covo_rl.cli import console_script; console_script()"
    done = subprocess.run([sys.executable, "-c", code, *words.split(), "a run"], capture_output=True, text=True,
                          env=environment, cwd=folder, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr, folder


def test_no_line_of_a_library_is_among_them(demo):
    out, err, _ = demo
    lines = [line for line in (out + err).splitlines() if "mine" not in line]
    assert [line for line in lines for pattern in NOISE if re.search(pattern, line)] == []
    assert "\x1b" not in out + err


def test_a_warning_of_the_user_s_own_is_shown(demo):
    assert "FutureWarning: mine is deprecated \\x1b[31m" in demo[0] + demo[1]


def test_evaluation_legend_and_rollouts_are_shown_in_their_order(demo):
    out = demo[0]
    order = ["self-check", "before, greedy: 8/8  ", "before, sampled: 8/8  ", "columns of a step", "step    1/2  R ",
             "rollouts of step 1: best, median, worst of 8", "step    2/2  R ", "rollouts of step 2",
             "after, greedy: 8/8", "after, silent, sampled: 8/8", "after, swapped, sampled", "held-out, before and",
             "\nnext\n"]  # fmt: skip
    places = [out.find(text) for text in order]
    assert -1 not in places and places == sorted(places)
    verdict = next(line for line in out.splitlines() if line.startswith("best"))
    assert re.fullmatch(r"best  R -?\d\.\d\d  accuracy \d\.\d\d  format \d\.\d\d  score \d\.\d\d", verdict)
    assert out.count("  question  ") == 6 and not re.search(r"\d\.\d{5}", out.split("self-check")[1].split("next")[0])


def test_the_next_commands_run_as_printed(demo, monkeypatch):
    out, _, folder = demo
    commands = [shlex.split(line) for line in out.split("\nnext\n")[1].splitlines() if line.startswith("  covo-rl ")]
    assert [words[1] for words in commands] == ["report", "generate", "eval", "export"]
    monkeypatch.chdir(folder)
    for words in (commands[1], [word for word in commands[2] if word != "--listen"] + ["--limit", "4", "--no-plots"]):
        result = CliRunner().invoke(command_app(words[1]), words[2:])
        assert result.exit_code == 0, result.output
    assert (folder / "a run-eval" / "report.json").is_file()


# -- each by itself ----------------------------------------------------------------------------------------------------


def shown(message, category, module):
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        noise.quiet()
        warnings.warn_explicit(message, category, "f.py", 1, module=module)
    return [str(warning.message) for warning in caught]


def test_only_the_listed_warnings_are_left_out(monkeypatch):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    renamed = "The PEFT config's `base_model_name_or_path` was renamed from 'a' to 'b'."
    assert shown(renamed, UserWarning, "peft.mapping_func") == []
    assert shown(renamed, UserWarning, "mine") == [renamed]
    assert shown(renamed, FutureWarning, "peft.mapping_func") == [renamed]
    assert shown("something else", UserWarning, "peft.mapping_func") == ["something else"]
    old = "`gradient_checkpointing` is deprecated and will be removed in v6. Use `activation_checkpointing` instead."
    assert shown(old, FutureWarning, "transformers.training_args") == []
    assert shown("`other` is deprecated", FutureWarning, "transformers.training_args") != []
    monkeypatch.setenv("PYTHONWARNINGS", "always")
    assert shown(renamed, UserWarning, "peft.mapping_func") == [renamed], "asked for, all are shown"


def test_only_the_listed_log_messages_are_left_out(caplog, monkeypatch):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    logger = logging.getLogger("transformers.generation.utils")
    monkeypatch.setattr(logger, "filters", [])
    noise.quiet()
    noise.quiet()
    assert len(logger.filters) == 1
    record = logging.LogRecord(
        logger.name, logging.WARNING, "f", 1, "Setting `pad_token_id` to `eos_token_id`:2", (), None
    )
    other = logging.LogRecord(logger.name, logging.WARNING, "f", 1, "A decoder-only architecture is used", (), None)
    assert not logger.filter(record) and logger.filter(other)


def test_the_config_of_phi4_is_read_without_advice_to_its_publisher(caplog, monkeypatch):
    from transformers import Phi4MultimodalConfig
    from transformers.utils import logging as transformers_logging

    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    logger = logging.getLogger("transformers.modeling_rope_utils")
    monkeypatch.setattr(logger, "filters", [])
    logger.addHandler(caplog.handler)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    said = []
    for quiet in (lambda: None, noise.quiet):
        quiet()
        transformers_logging.warning_once.cache_clear()
        caplog.clear()
        Phi4MultimodalConfig(hidden_size=64, num_attention_heads=4, partial_rotary_factor=1.0, rope_parameters=rope)
        said.append(sum("original_max_position_embeddings" in record.getMessage() for record in caplog.records))
    logger.removeHandler(caplog.handler)
    assert said[0] > 0 and said[1] == 0


def test_bars_of_downloads_stay(monkeypatch):
    from transformers.utils import logging as transformers_logging

    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    noise.quiet_bars()
    bars = {desc: transformers_logging.tqdm(range(3), desc=desc) for desc in ("Loading weights", "Fetching 3 files")}
    assert {desc: bar.disable for desc, bar in bars.items()} == {"Loading weights": True, "Fetching 3 files": False}
    for bar in bars.values():
        bar.close()


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_schedule_advances_as_its_step_does_and_says_nothing_of_an_update_left_out(warmup):
    def made():
        optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.3)])
        return optimizer, schedule_of("cosine", optimizer, warmup_steps=warmup, steps=6)

    (stepped, schedule), (advanced, other) = made(), made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for update in range(6):
            if update:  # the first update was not finite
                stepped.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                schedule.step()
            advance_schedule(other)
            rates = [[group["lr"] for group in each.param_groups] for each in (stepped, advanced)]
            assert rates[0] == rates[1] and other.get_last_lr() == rates[1]
        place_schedule(other, 2)
        assert other.last_epoch == 2
