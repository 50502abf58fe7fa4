"""A tiny text model from nothing: the decoder that a tiny Covo-Audio begins with, as a published one has Qwen2.5.

It reads the texts of a world, and its tokenizer writes their words, and those of instructions, in one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from covo_rl.data.noise import quiet, quiet_bars
from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM, WRITTEN_SYSTEM
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.models.tiny.tokenizer import SPECIAL_TOKENS, tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, random_weights
from covo_rl.records.console import ProgressDisplay
from covo_rl.supervised.pretrain.builder import INSTRUCTIONS
from covo_rl.supervised.pretrain.dialogues import QUERIES

VOCABULARY = 512
WIDTH, LAYERS = 128, 4
#: one so small learns nothing for long from the usual deviation of 0.02
DEVIATION = 0.08
BATCH, PEAK, WARMUP = 48, 2e-3, 30
#: what the training texts do not say and prompts do; often enough for its words to become tokens
WORDING = [*(text for texts in INSTRUCTIONS.values() for text in texts), *QUERIES, SPOKEN_SYSTEM, WRITTEN_SYSTEM]


def make_text_model(
    texts: Sequence[str], folder: str | Path, *, steps: int = 600, seed: int = 0, names: Sequence[str] = ()
) -> float:
    """Train a Qwen2 on `texts` from random weights and write it to `folder`; returns its last losses' mean.

    `names`: speakers, whom system messages name.
    """
    quiet()
    quiet_bars()
    wording = [*WORDING, *(f"system\nSpeaker: {name}." for name in names), "user\nassistant\n"]
    tokenizer = tiny_tokenizer([*texts[:1000], *wording * 20], VOCABULARY, audio_tokens=())
    ids: Any = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS])
    end, _, turn_end = ids
    config = Qwen2Config(
        **decoder_sizes(WIDTH, LAYERS), vocab_size=len(tokenizer), initializer_range=DEVIATION,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, max_position_embeddings=2048,
        bos_token_id=end, pad_token_id=end, eos_token_id=turn_end, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    model = random_weights(Qwen2ForCausalLM, config, seed, scale=1)
    documents = [[*tokenizer(text)["input_ids"], end] for text in texts]
    loss = _train(model, documents, end, steps, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def _train(model: Qwen2ForCausalLM, documents: Sequence[list[int]], end: int, steps: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    model.train()
    with ProgressDisplay("text model", steps, stderr=True) as display:
        for step in range(steps):
            share = (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item()) / 2
            for group in optimizer.param_groups:
                group["lr"] = PEAK * min(1, (step + 1) / WARMUP) * (0.1 + 0.9 * share)
            chosen = torch.randint(len(documents), (BATCH,), generator=generator).tolist()
            rows = [torch.tensor(documents[i]) for i in chosen]
            ids_NT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
            labels_NT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)
            loss = model(input_ids=ids_NT, labels=labels_NT, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            display.update(step + 1, f"loss {losses[-1]:.3f}")
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])
