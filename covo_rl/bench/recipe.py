"""Steps of the 7B recipe with random weights: where the time of a whole training step goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covo_rl.audio import ClipStore
from covo_rl.bench.case import random_model
from covo_rl.bench.lengths import END_ID
from covo_rl.bench.meter import GIB
from covo_rl.bench.sizes import MODEL_SIZES, RATE, SECONDS
from covo_rl.config import parse_options
from covo_rl.policy import Policy
from covo_rl.resolve import find
from covo_rl.train.launch import join
from covo_rl.train.loop import Trainer
from covo_rl.types import Clip, Example

REPORTED = ("sampling/", "engine/", "grad", "loss")


def recipe_steps(
    size: str, *, steps: int = 3, prompts: int = 8, completion: int = 256, folder: Path
) -> Iterator[dict[str, Any]]:
    """Seconds by phase of each step of recipes/configs/covo_audio_7b_lora.yaml, peak memory, differences of sampling.

    Rows are 30 s clips of noise; the reward is one that differs within a group, since without variance nothing trains.
    Everything else is the recipe's, but for `prompts` per step and the length of completions.
    """
    options = parse_options(["--config", str(find("recipes", "configs/covo_audio_7b_lora.yaml"))])
    options.train.prompts_per_step, options.rollout.max_completion_length = prompts, completion
    options.train.max_steps, options.train.output = steps, str(folder)
    options.reward.rewards = {text_length: 1.0}  # type: ignore[assignment]  # a function is one too
    accelerator = join()
    dtype = torch.bfloat16 if options.model.dtype == "bfloat16" else torch.float32
    family, trained = random_model(MODEL_SIZES[size], 188, accelerator.device, dtype)
    family.end_ids = (END_ID,)  # the trainer wants one; a random model hardly ever draws it
    clips = ClipStore()
    policy = Policy(
        family, trained, clips=clips, feature_memory_mb=options.train.feature_memory_mb,
        gradient_checkpointing=options.train.gradient_checkpointing, keep_reference=bool(options.loss.beta),
    )  # fmt: skip
    trainer = Trainer(options, policy, clips, noise_examples(steps * prompts), accelerator)
    cuda = accelerator.device.type == "cuda"
    for _ in range(steps):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        metrics, _ = trainer.train_step()
        yield {
            "seconds": metrics["seconds"],
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
            **{name: value for name, value in metrics.items() if name.startswith(REPORTED)},
        }


def noise_examples(count: int) -> list[Example]:
    """Questions about clips of noise of 30 s, each its own."""
    rng = np.random.default_rng(0)
    waves = (0.1 * rng.standard_normal((count, int(SECONDS * RATE)))).astype(np.float32)
    return [
        Example(f"row{n}", (Clip(array=wave, sampling_rate=RATE),), "What do you hear?") for n, wave in enumerate(waves)
    ]


def text_length(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward for tests of speed: the completion's characters modulo 8, over 8."""
    return [len(text) % 8 / 8 for text in completions]
