"""The real trainer on a tiny random Covo-Audio: built in milliseconds, steps in tenths of a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import policy_cases as cases
import torch
from accelerate import Accelerator

from covo_rl.config import Options
from covo_rl.records.folder import Run
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StopSignals
from covo_rl.train.loop import Trainer
from covo_rl.types import Example


def vowels(prompts, completions, **columns):
    """A deterministic score that differs between random texts: the share of low code points."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ord(ch) % 7 for ch in text) % 13 / 12 for text in texts]


vowels.isolation = "thread"


def rows(count: int = 6) -> list[Example]:
    lengths = [(0.6,), (), (0.3, 0.9), (0.4,), (1.0,), (0.5,)]
    return [
        Example(f"row{i}", tuple(cases.clip(10 * i + c, s) for c, s in enumerate(lengths[i % 6])),
                "What do you hear?" + " The dog barks." * (i % 3), ("bell", "dog"), "bell")
        for i in range(count)
    ]  # fmt: skip


def options(folder: Path, **changes) -> Options:
    """Four prompts of six rows a step, so that epochs end inside steps."""
    made = Options()
    made.prompt.instruction = ""
    defaults = {
        "output": str(folder), "max_steps": 4, "prompts_per_step": 4, "micro_batch_prompts": 2, "learning_rate": 1e-2,
        "num_generations": 3, "max_completion_length": 8, "loss_type": "grpo", "rewards": {vowels: 1.0},
    }  # fmt: skip
    for name, value in {**defaults, **changes}.items():
        room = next(room for room in vars(made).values() if hasattr(room, name))
        setattr(room, name, value)
    return made


def trainer(
    settings: Options,
    examples: Sequence[Example] | None = None,
    family: str = "covo_audio",
    accelerator: Accelerator | None = None,
) -> Trainer:
    torch.manual_seed(settings.train.seed)  # LoRA's first matrix is drawn from the global state
    adapter = settings.adapter
    codes = {"audio_codes": 100} if settings.loss.policy_ids != "all" else None
    policy = cases.policy(
        family, lora=adapter.lora, adapter=None if adapter.lora else {"train_parts": adapter.train_parts},
        keep_reference=bool(settings.loss.beta), sizes=codes,
    )  # fmt: skip
    accelerator = accelerator or Accelerator(cpu=True)
    accelerator.free_memory()  # under FSDP2 it compares parameters with those of every model that it has prepared
    made = Trainer(settings, policy, policy.clips, examples or rows(), accelerator)
    made.prefetch.active = True  # as on an accelerator
    return made


def run(
    settings: Options,
    *,
    stop: StopSignals | None = None,
    examples: Sequence[Example] | None = None,
    saver: bool = True,
    accelerator: Accelerator | None = None,
) -> tuple[Trainer, list[str]]:
    """Train to the end in the run folder, resuming if `settings` says so; returns what the saver noted."""
    made = trainer(settings, examples, accelerator=accelerator)
    folder = Path(settings.train.output)
    checkpoints = Saver(settings, folder, stop)
    notes = checkpoints.resume(made, settings.train.resume, allow_changed=settings.train.allow_changed_config)
    record = Run(folder, active=made.accelerator.is_main_process)
    made.run(lambda metrics, batch: record.log_metrics(metrics), checkpoints if saver else None)
    return made, notes


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without the wall-clock times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]
