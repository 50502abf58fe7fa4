"""The model and the rows of a benchmark cell: a Whisper-style encoder, a Qwen2 decoder, LoRA, random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, PromptConfig, RolloutConfig
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable as build_modes
from covo_rl.prompt import build_prompt
from covo_rl.types import Clip, Example, Group, Prompt, Rollout

SECONDS = 30.0
RATE = 16000
#: ids below are bytes, never a placeholder, which stock forwards would take for audio
PLAIN_IDS = 250
#: audio positions of 30 s -> adapter down-sampling (1500 encoder positions)
DOWNSAMPLE = {94: 16, 188: 8, 375: 4, 750: 2}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark model; the defaults are the published comparison's."""

    decoder_layers: int = 8
    decoder_width: int = 512
    decoder_heads: int = 8
    encoder_layers: int = 4
    encoder_width: int = 256
    vocabulary: int = 8192
    lora_r: int = 16


@dataclass(frozen=True)
class Cell:
    """`positions` P audio positions per prompt, `generations` G, `completion` C ids, over `clips` unique clips."""

    positions: int
    generations: int
    completion: int
    clips: int = 2

    def __post_init__(self) -> None:
        if self.positions not in DOWNSAMPLE:
            raise ValueError(f"P={self.positions}: a 30 s clip can fill {', '.join(map(str, DOWNSAMPLE))} positions")


class EndlessCovoAudio(CovoAudio):
    """No end token, so that every completion has exactly C ids and runs can be compared."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return ()


@dataclass
class Case:
    """A policy, its prompts and the sampling options of one cell."""

    cell: Cell
    sizes: Sizes
    policy: Policy
    prompts: list[Prompt]
    config: RolloutConfig

    def groups(self, seed: int = 0) -> list[Group]:
        """Random completions, for measurements that need no sampling."""
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, PLAIN_IDS, (len(self.prompts), self.cell.generations, self.cell.completion))
        zeros = (0.0,) * self.cell.completion
        return [
            Group(prompt, tuple(Rollout(tuple(row.tolist()), zeros, "", "length") for row in rows))
            for prompt, rows in zip(self.prompts, ids, strict=True)
        ]


def make(cell: Cell, sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Build model, clips (30 s of noise) and prompts."""
    tokenizer = tiny_tokenizer(["What do you hear?"], 300)
    model, processor = tiny_covo_audio(
        tokenizer,
        encoder_width=sizes.encoder_width,
        encoder_layers=sizes.encoder_layers,
        encoder_heads=sizes.encoder_width // 64,
        decoder_width=sizes.decoder_width,
        decoder_layers=sizes.decoder_layers,
        decoder_heads=sizes.decoder_heads,
        segment_seconds=SECONDS,
        mel_bins=80,
        adapter_hidden=2 * sizes.encoder_width,
        adapter_downsample=DOWNSAMPLE[cell.positions],
        audio_codes=sizes.vocabulary - len(tokenizer),
        seed=seed,
    )
    family = EndlessCovoAudio(model.to(device=device, dtype=dtype), processor)  # pyright: ignore[reportCallIssue]
    modes = build_modes(family, AdapterConfig(lora_r=sizes.lora_r))
    _wake_adapters(modes.peft_model, seed)
    clips = ClipStore()
    policy = Policy(family, modes.peft_model, clips=clips)
    rng = np.random.default_rng(seed)
    prompts = []
    for p in range(cell.clips):
        wave = rng.normal(size=int(SECONDS * RATE)).astype(np.float32) * 0.1
        row = Example(f"row{p}", (Clip(array=wave, sampling_rate=RATE),), "What do you hear?")
        prompts.append(build_prompt(row, family, clips, PromptConfig(instruction="")))
    options = RolloutConfig(num_generations=cell.generations, max_completion_length=cell.completion)
    return Case(cell, replace(sizes), policy, prompts, options)


def _wake_adapters(model: torch.nn.Module | None, seed: int) -> None:
    """LoRA B starts at zero, which would hide half of the gradients."""
    assert model is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
