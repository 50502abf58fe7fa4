"""Tiny families, prompts and the slow oracle (one row per rollout, full logits) for the policy and rollout tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, PromptConfig, RolloutConfig
from covo_rl.models import family_class
from covo_rl.models.base import AudioFamily
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.qwen2_audio import Qwen2Audio
from covo_rl.models.tiny import tiny_covo_audio, tiny_model, tiny_qwen2_audio, tiny_tokenizer
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable as build_modes
from covo_rl.prompt import build_prompt
from covo_rl.types import Clip, Example, Group, Prompt, Rollout

TEXTS = ("What do you hear? The bell rings twice before the dog barks.", "<think>a low tone</think><answer>B</answer>")
RATE = 16000


@cache
def _tokenizer():
    return tiny_tokenizer(TEXTS, 300)


def family(name: str = "covo_audio", seed: int = 0, sizes: dict | None = None) -> AudioFamily:
    """A fresh random family with weights large enough that logits differ clearly between tokens.

    `sizes` replace those of the Covo-Audio.
    """
    if name not in ("covo_audio", "qwen2_audio"):
        return family_class(name)(*tiny_model(name, seed=seed))
    if name == "covo_audio":
        defaults = {
            "encoder_width": 32, "encoder_layers": 1, "encoder_heads": 2, "decoder_width": 32, "decoder_layers": 2,
            "segment_seconds": 1.0, "mel_bins": 16, "adapter_hidden": 32, "initializer_range": 0.1,
        }  # fmt: skip
        model, processor = tiny_covo_audio(_tokenizer(), seed=seed, **{**defaults, **(sizes or {})})
        return CovoAudio(model, processor)
    model, processor = tiny_qwen2_audio(
        TEXTS, vocab_size=300, encoder_width=16, encoder_layers=1, decoder_width=32, mel_bins=16, seed=seed
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return Qwen2Audio(model, processor)


def policy(
    name: str = "covo_audio", *, lora: bool = True, seed: int = 0, adapter: dict | None = None,
    sizes: dict | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **kwargs
) -> Policy:  # fmt: skip
    """LoRA (fixed values, B not zero, so that it matters; float32 on a base in `dtype`) or full, ready to train."""
    made = family(name, seed, sizes)
    made.model.to(dtype)
    config = AdapterConfig(lora=lora, lora_r=4, lora_alpha=8.0, **(adapter or {}))
    modes = build_modes(made, config)
    generator = torch.Generator().manual_seed(seed + 1)
    if lora:
        with torch.no_grad():
            for n, p in made.model.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    made.model.to(device)
    return Policy(made, modes.peft_model, **{"clips": ClipStore(), **kwargs})


def with_likely_end(made: Policy, boost: float) -> Policy:
    """The end token made likely, so that rows finish at different steps."""
    head = made.family.lm_head
    bias = torch.zeros(head.out_features)
    bias[made.family.eos_token_ids[0]] = boost
    head.register_forward_hook(lambda module, args, out: out + bias)
    return made


def ids_of(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """Completions of all groups, one after the other."""
    return [rollout.completion_ids for group in groups for rollout in group.rollouts]


def clip(seed: int, seconds: float) -> Clip:
    wave = np.random.default_rng(seed).normal(size=int(RATE * seconds)).astype(np.float32) * 0.1
    return Clip(array=wave, sampling_rate=RATE)


def prompts(made: Policy, *, seconds: Sequence[Sequence[float]] = ((0.6,), (), (0.9, 0.3), (0.4,))) -> list[Prompt]:
    """One prompt per entry: one clip, text only, two clips, and so on; questions of different length."""
    rows = []
    for p, lengths in enumerate(seconds):
        clips = tuple(clip(10 * p + c, s) for c, s in enumerate(lengths))
        question = "What do you hear?" + " The dog barks." * (p % 3)
        rows.append(Example(f"row{p}", clips, question, ("bell", "dog"), "bell"))
    config = PromptConfig(instruction="")
    return [build_prompt(row, made.family, made.clips, config) for row in rows]


def group(prompt: Prompt, lengths: Sequence[int], seed: int = 0) -> Group:
    """Rollouts of random ids: for scoring it does not matter who wrote them."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for length in lengths:
        ids = tuple(int(i) for i in rng.integers(0, 250, size=length))
        rollouts.append(Rollout(ids, (0.0,) * length, "", "stop"))
    return Group(prompt, tuple(rollouts))


def ragged_groups(made: Policy) -> list[Group]:
    """Lengths 1 (no completion input at all) to 40, so that several buckets and paddings occur."""
    lengths = ((5, 1, 12), (40, 3, 3, 33), (7, 7), (1, 1, 2))
    return [group(p, n, seed=i) for i, (p, n) in enumerate(zip(prompts(made), lengths, strict=True))]


def oracle_logits(made: Policy, prompt: Prompt, ids: Sequence[int], *, left_pad: int = 0) -> torch.Tensor:
    """Plain forward of one row [padding | prompt | completion]: logits (C, V) that predict the completion."""
    fam = made.family
    row = torch.tensor([[*prompt.input_ids, *ids]], device=made.device)
    embeds = fam.embed_tokens(fam.embeddable(row))
    clips = [fam.clip_features(*made.clips.waveform(key)) for key in prompt.clip_keys]
    if clips:
        audio = torch.cat([fam.encode([c])[0] for c in clips])
        place = (row[0, : len(prompt.input_ids)] == fam.audio_token_id).nonzero()[:, 0]
        embeds = embeds.index_copy(1, place, audio[None].to(embeds.dtype))
    mask = torch.ones_like(row)
    if left_pad:
        embeds = torch.cat((torch.randn(1, left_pad, embeds.shape[-1]).to(embeds), embeds), 1)
        mask = torch.cat((mask.new_zeros(1, left_pad), mask), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = fam.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    logits = fam.lm_head(hidden.last_hidden_state)[0]
    start = left_pad + len(prompt.input_ids) - 1
    return logits[start : start + len(ids)]


def oracle_logps(
    made: Policy, groups: Sequence[Group], *, temperature: float = 1.0, left_pad: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per rollout: log-probs (C,) and entropies (C,), from full logits."""
    logps, entropies = [], []
    for one in groups:
        for rollout in one.rollouts:
            logits = oracle_logits(made, one.prompt, rollout.completion_ids, left_pad=left_pad).float() / temperature
            table = logits.log_softmax(-1)
            ids_C1 = torch.tensor(rollout.completion_ids, device=made.device)[:, None]
            logps.append(table.gather(1, ids_C1)[:, 0])
            entropies.append(-(table.exp() * table).sum(-1))
    return logps, entropies


def padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def weights(groups: Sequence[Group], seed: int = 3) -> torch.Tensor:
    """Random loss weights (N, C), zero at padding: sum(weights * logps) tests every gradient path."""
    lengths = [len(r.completion_ids) for g in groups for r in g.rollouts]
    generator = torch.Generator().manual_seed(seed)
    return padded([torch.randn(n, generator=generator) for n in lengths])


def gradients(made: Policy) -> dict[str, torch.Tensor]:
    """Gradients of everything trainable; and clears them."""
    found = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.zero_grad(set_to_none=True)
    return found


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys() and ours, ours.keys() ^ theirs.keys()
    top = max(float(t.norm()) for t in theirs.values())
    return max(float((ours[n] - theirs[n]).norm()) / max(float(theirs[n].norm()), 1e-3 * top) for n in ours)


SMALL = RolloutConfig(num_generations=3, max_completion_length=12)
