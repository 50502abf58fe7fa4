"""What a model says where a document's response begins, and how likely it finds the response: measures of training.

prompt | response     the prompt is all of a document before its first taught label
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.speech.grid import RATE
from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain.document import Document
from covo_rl.supervised.pretrain.packing import clip_samples

BATCH = 25
Rows = Mapping[str, SpeechRow]


def prompt_of(document: Document) -> Document:
    """The document up to its first taught label, which may not be followed by more audio that is needed before."""
    end = next(i for i, label in enumerate(document.labels) if label != IGNORE)
    return Document(document.ids[:end], document.labels[:end], document.clips)


@torch.no_grad()
def reply(family: Any, prompts: Sequence[Document], rows: Rows, limit: int, least: int = 0) -> list[list[int]]:
    """Greedy replies of `least` to `limit` ids, each without its end. `rows`: id -> the row that a clip names."""
    model, pad = family.model, family.pad_token_id
    ends = {model.config.text_end_token_id, model.config.turn_end_token_id}
    replies: list[list[int]] = []
    for batch in _batches(prompts):
        length = max(map(len, batch))
        ids_NT = torch.tensor([[pad] * (length - len(prompt)) + prompt.ids for prompt in batch])
        mask_NT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in batch])
        out = model.generate(
            input_ids=ids_NT, attention_mask=mask_NT, **_audio(family, batch, rows), max_new_tokens=limit,
            min_new_tokens=least or None, do_sample=False, eos_token_id=sorted(ends), pad_token_id=pad,
        )  # fmt: skip
        for row in out[:, length:].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            replies.append(row[:end])
    return replies


@torch.no_grad()
def response_loss(family: Any, documents: Sequence[Document], rows: Rows) -> float:
    """Nats of a taught label, on average over those of all documents."""
    total = taught = 0.0
    for batch in _batches(documents):
        ids_NT = _padded([document.ids for document in batch], family.pad_token_id)
        labels_NT = _padded([document.labels for document in batch], IGNORE)
        mask_NT = _padded([[1] * len(document) for document in batch], 0)
        logits_NTV = family.model(input_ids=ids_NT, attention_mask=mask_NT, **_audio(family, batch, rows)).logits
        labels = labels_NT[:, 1:].flatten()
        total += float(F.cross_entropy(logits_NTV[:, :-1].float().flatten(0, 1), labels, reduction="sum"))
        taught += int((labels != IGNORE).sum())
    return total / taught


def _batches(documents: Sequence[Document]) -> list[Sequence[Document]]:
    return [documents[start : start + BATCH] for start in range(0, len(documents), BATCH)]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _audio(family: Any, documents: Sequence[Document], rows: Rows) -> dict[str, Tensor]:
    waves: list[np.ndarray] = []
    for document in documents:
        for name, a, b in document.clips:
            waves.append(clip_samples(rows[name].wave(), a, b))
    if not waves:
        return {}
    fields = dict(family.processor.feature_extractor(waves, sampling_rate=RATE))
    return {**fields, "clip_order": torch.arange(len(waves))}
