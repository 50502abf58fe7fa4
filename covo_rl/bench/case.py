"""What a benchmark runs on: a Covo-Audio of any size with random weights and woken LoRA, clips of noise, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMultimodalLM

from covo_rl.audio import ClipStore
from covo_rl.bench.sizes import DOWNSAMPLE, RATE, SECONDS, Cell, Sizes
from covo_rl.config import AdapterConfig, PromptConfig, RolloutConfig
from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioProcessor
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.tiny import COVO_AUDIO_TOKENS, SPECIAL_TOKENS, tiny_tokenizer
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.prompt import build_prompt
from covo_rl.types import Clip, Example, Group, Prompt, Rollout

#: ids below are bytes, never a placeholder, which stock forwards would take for audio
PLAIN_IDS = 250


class EndlessCovoAudio(CovoAudio):
    """No end token, so that every completion has exactly C ids and runs can be compared; or those of `end_ids`."""

    end_ids: tuple[int, ...] = ()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.end_ids


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


def random_model(
    sizes: Sizes, positions: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[EndlessCovoAudio, Any]:
    """A Covo-Audio of these sizes, made on `device` in `dtype`, and the PEFT model whose LoRA is woken.

    `positions` is how many a 30 s clip fills.
    """
    tokenizer = tiny_tokenizer(["What do you hear?"], 300)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = AutoModelForMultimodalLM.from_config(model_config_of(sizes, positions, tokenizer), dtype=dtype).eval()
    processor = CovoAudioProcessor.from_model_config(model.config, tokenizer)
    family = EndlessCovoAudio(model, processor)
    trained = make_trainable(family, AdapterConfig(lora_r=sizes.lora_r, lora_alpha=sizes.lora_alpha)).peft_model
    assert trained is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:  # starts at zero, which would hide half of the gradients
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return family, trained


def model_config_of(sizes: Sizes, positions: int, tokenizer: Any = None) -> CovoAudioConfig:
    """The configuration of `random_model`: the published one but for sizes, and the ids of a small tokenizer."""
    tokenizer = tokenizer or tiny_tokenizer(["What do you hear?"], 300)
    pad, _, turn_end, *audio = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *COVO_AUDIO_TOKENS])
    decoder = {
        "hidden_size": sizes.decoder_width, "intermediate_size": sizes.mlp_width, "vocab_size": sizes.vocabulary,
        "num_hidden_layers": sizes.decoder_layers, "num_attention_heads": sizes.decoder_heads,
        "num_key_value_heads": sizes.key_value_heads,
        "bos_token_id": pad, "pad_token_id": pad, "eos_token_id": turn_end,
    }  # fmt: skip
    encoder = {
        "d_model": sizes.encoder_width, "encoder_layers": sizes.encoder_layers, "num_mel_bins": sizes.mel_bins,
        "encoder_attention_heads": sizes.encoder_width // 64, "encoder_ffn_dim": 4 * sizes.encoder_width,
    }  # fmt: skip
    return CovoAudioConfig(
        llm_config=decoder, encoder_config=encoder, adapter_downsample=DOWNSAMPLE[positions],
        adapter_hidden_dim=sizes.adapter_hidden, audio_token_index=len(tokenizer), audio_bos_token_id=audio[0],
        audio_placeholder_token_id=audio[1], audio_eos_token_id=audio[2], turn_end_token_id=turn_end,
        text_end_token_id=pad,
    )  # fmt: skip


def workload_of(
    cell: Cell, sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Workload:
    """Model, clips (30 s of noise) and prompts of a cell."""
    return workload_on(*random_model(sizes, cell.positions, device, dtype, seed), cell, seed)


def workload_on(family: EndlessCovoAudio, trained: Any, cell: Cell, seed: int = 0) -> Workload:
    """Clips and prompts of a cell for a model that is there; its clips must fill as many positions."""
    clips, rng, prompts = ClipStore(), np.random.default_rng(seed), []
    for p in range(cell.clips):
        wave = rng.normal(size=int(SECONDS * RATE)).astype(np.float32) * 0.1
        row = Example(f"row{p}", (Clip(array=wave, sampling_rate=RATE),), "What do you hear?")
        prompts.append(build_prompt(row, family, clips, PromptConfig(instruction="")))
    options = RolloutConfig(num_generations=cell.generations, max_completion_length=cell.completion)
    return Workload(cell, Policy(family, trained, clips=clips), prompts, options)
