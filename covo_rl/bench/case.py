"""A benchmark cell: model (Whisper-style encoder, Qwen2 decoder, LoRA, random weights), rows, count of operations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, PromptConfig, RolloutConfig
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.prompt import build_prompt
from covo_rl.types import Clip, Example, Group, Prompt, Rollout

SECONDS, RATE, FRAMES_PER_SECOND, MEL_BINS = 30.0, 16000, 100, 80
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

    @property
    def rows(self) -> int:
        """N, completions of a step."""
        return self.clips * self.generations


class EndlessCovoAudio(CovoAudio):
    """No end token, so that every completion has exactly C ids and runs can be compared."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return ()


@dataclass
class Workload:
    """A policy, its prompts and the sampling options of one cell."""

    cell: Cell
    policy: Policy
    prompts: list[Prompt]
    config: RolloutConfig

    def groups(self, seed: int = 0) -> list[Group]:
        """Random completions, for measurements that need no sampling."""
        shape = (len(self.prompts), self.cell.generations, self.cell.completion)
        return groups_of(self.prompts, np.random.default_rng(seed).integers(0, PLAIN_IDS, shape).tolist())


def groups_of(prompts: list[Prompt], ids_PGC: list[list[list[int]]]) -> list[Group]:
    """Groups of completions that were cut by length, without log-probs."""
    return [
        Group(prompt, tuple(Rollout(tuple(row), (0.0,) * len(row), "", "length") for row in rows))
        for prompt, rows in zip(prompts, ids_PGC, strict=True)
    ]


def workload_of(
    cell: Cell, sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Workload:
    """Model, clips (30 s of noise) and prompts of a cell."""
    tokenizer = tiny_tokenizer(["What do you hear?"], 300)
    model, processor = tiny_covo_audio(
        tokenizer, encoder_width=sizes.encoder_width, encoder_layers=sizes.encoder_layers,
        encoder_heads=sizes.encoder_width // 64, decoder_width=sizes.decoder_width,
        decoder_layers=sizes.decoder_layers, decoder_heads=sizes.decoder_heads, segment_seconds=SECONDS,
        mel_bins=MEL_BINS, adapter_hidden=2 * sizes.encoder_width, adapter_downsample=DOWNSAMPLE[cell.positions],
        audio_codes=sizes.vocabulary - len(tokenizer), seed=seed,
    )  # fmt: skip
    family = EndlessCovoAudio(model.to(device=device, dtype=dtype), processor)  # pyright: ignore[reportCallIssue]
    trained = make_trainable(family, AdapterConfig(lora_r=sizes.lora_r)).peft_model
    assert trained is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:  # starts at zero, which would hide half of the gradients
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    clips, rng, prompts = ClipStore(), np.random.default_rng(seed), []
    for p in range(cell.clips):
        wave = rng.normal(size=int(SECONDS * RATE)).astype(np.float32) * 0.1
        row = Example(f"row{p}", (Clip(array=wave, sampling_rate=RATE),), "What do you hear?")
        prompts.append(build_prompt(row, family, clips, PromptConfig(instruction="")))
    options = RolloutConfig(num_generations=cell.generations, max_completion_length=cell.completion)
    return Workload(cell, Policy(family, trained, clips=clips), prompts, options)


def flops(cell: Cell, sizes: Sizes, prompt_length: int, *, stock: bool) -> dict[str, float]:
    """Floating-point operations of a step by phase: the ratio of stock to ours is the ceiling of any speed-up.

    A product of (a, b) and (b, c) counts 2abc. The backward of a frozen linear layer costs its forward once more (the
    gradient of its input), that of attention twice. LoRA, norms and activations are left out: they are small, and the
    same per position in both variants.
    """
    T, C, N = prompt_length, cell.completion, cell.rows
    copies = N if stock else cell.clips
    # per position: q and o, k and v at half as many heads, three of the MLP (3 D)
    linear = 2 * sizes.decoder_layers * sizes.decoder_width**2 * (2 + 1 + 9)
    # scores and weighted values of each pair of query and key
    pair = 4 * sizes.decoder_layers * sizes.decoder_width
    prompt_linear, prompt_attention = copies * T * linear, copies * T * (T + 1) / 2 * pair
    row_linear, row_attention = N * C * linear, N * (C * T + C * (C + 1) / 2) * pair
    prompt, completion = prompt_linear + prompt_attention, row_linear + row_attention
    head = N * C * 2 * sizes.decoder_width * sizes.vocabulary
    encode = copies * encoder_flops(cell, sizes)
    audio = encode if stock else 0.0
    return {
        "encode": encode,
        "prefill": prompt,
        "decode": completion + head,
        "old": audio + completion + head + (prompt if stock else 0.0),
        "loss": audio + 2 * (prompt_linear + row_linear + head) + 3 * (prompt_attention + row_attention),
    }


def encoder_flops(cell: Cell, sizes: Sizes) -> float:
    """Encoder and adapter over one 30 s clip."""
    width, frames = sizes.encoder_width, SECONDS * FRAMES_PER_SECOND
    length = frames / 2
    convolutions = 2 * 3 * (MEL_BINS * width * frames + width * width * length)
    layers = sizes.encoder_layers * (2 * 12 * width**2 * length + 4 * length**2 * width)
    adapter, stage, factor = 0.0, length, DOWNSAMPLE[cell.positions]
    while factor > 1:
        factor //= 2
        stage = -(-stage // 2)
        out = sizes.decoder_width if factor == 1 else width
        adapter += 2 * stage * (3 * width**2 + 2 * width * width + 2 * width * out)
    return convolutions + layers + adapter
