"""Groups of rollouts as ONE packed row of tokens, without padding and without repeating a prompt.

    [ prompt a | prompt b | ... | a's completion 1 | ... | a's completion G | b's completion 1 | ... ]

Positions restart after the prompt for every completion. The last id of a completion predicts nothing and is left
out; the last position of a prompt predicts the first id of each of its completions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from covo_rl.types import Group, Prompt

Span = tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """One packed row of L tokens. All index tensors are int64 on one device.

    `prompts` are the unique prompts in packing order with `prompt_spans`; `row_spans[n]` are the completion inputs
    of row n (caller's order, may be empty) and `row_prompts[n]` its prompt. `predictors_M` is the position whose
    hidden state predicts `targets_M`, over all completion ids in the caller's order; `mask_NC` holds their places.
    `audio_positions_S` are filled by the features of `audio_keys`, in order. With `cached_prompts` the row holds
    completions only, and predictors count from a leading block of the prompts' last positions.
    """

    prompts: tuple[Prompt, ...]
    prompt_spans: tuple[Span, ...]
    row_spans: tuple[Span, ...]
    row_prompts: tuple[int, ...]
    input_ids_L: torch.Tensor
    position_ids_L: torch.Tensor
    predictors_M: torch.Tensor
    targets_M: torch.Tensor
    mask_NC: torch.Tensor
    audio_positions_S: torch.Tensor
    audio_keys: tuple[str, ...]
    prompt_positions: int


def identity(prompt: Prompt) -> Hashable:
    """Two prompts with the same ids and the same clips are the same prompt."""
    return prompt.input_ids, prompt.clip_keys


def unique_prompts(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """Unique prompts, and for every given prompt the index of its unique one."""
    places: dict[Hashable, int] = {}
    unique, index = [], []
    for prompt in prompts:
        place = places.setdefault(identity(prompt), len(unique))
        if place == len(unique):
            unique.append(prompt)
        index.append(place)
    return unique, index


def pack(
    groups: Sequence[Group], audio_token_id: int, device: torch.device | str, *, cached_prompts: bool = False
) -> Packed:
    """Pack prompts and completions of `groups`; equal prompts are packed once.

    Raises ValueError for a completion without ids.
    """
    prompts, index = unique_prompts([group.prompt for group in groups])
    rows = [(index[g], r.completion_ids) for g, group in enumerate(groups) for r in group.rollouts]
    if empty := [n for n, (_, ids) in enumerate(rows) if not ids]:
        raise ValueError(f"rollouts {empty[:8]} have no completion ids; a completion has at least its end token")
    lengths = np.array([len(ids) for _, ids in rows], dtype=np.int64)
    prompt_lengths = np.array([len(p.input_ids) for p in prompts], dtype=np.int64)
    prompt_ends = np.cumsum(prompt_lengths)
    prompt_starts = prompt_ends - prompt_lengths
    positions = [] if cached_prompts else [np.arange(n) for n in prompt_lengths]
    ids = [] if cached_prompts else [np.asarray(p.input_ids, dtype=np.int64) for p in prompts]
    cursor = 0 if cached_prompts else int(prompt_lengths.sum())
    # in the cached form the hidden states are [last position of each prompt | completions]
    offset = len(prompts) if cached_prompts else 0
    last = np.arange(len(prompts)) if cached_prompts else prompt_ends - 1
    spans: list[Span] = [(0, 0)] * len(rows)
    for n in sorted(range(len(rows)), key=lambda n: rows[n][0]):
        prompt, completion = rows[n]
        spans[n] = (cursor, cursor + len(completion) - 1)
        ids.append(np.asarray(completion[:-1], dtype=np.int64))
        positions.append(prompt_lengths[prompt] + np.arange(len(completion) - 1))
        cursor = spans[n][1]
    predictors = [
        np.concatenate(([last[prompt]], np.arange(*span) + offset))
        for (prompt, _), span in zip(rows, spans, strict=True)
    ]
    flat_ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
    audio = np.zeros(0, dtype=np.int64)
    if not cached_prompts:
        audio = np.flatnonzero(flat_ids[: int(prompt_lengths.sum())] == audio_token_id)
    width = int(lengths.max()) if len(rows) else 0

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return Packed(
        prompts=tuple(prompts),
        prompt_spans=tuple(zip(prompt_starts.tolist(), prompt_ends.tolist(), strict=True)),
        row_spans=tuple(spans),
        row_prompts=tuple(prompt for prompt, _ in rows),
        input_ids_L=tensor(flat_ids),
        position_ids_L=tensor(np.concatenate(positions).astype(np.int64) if positions else flat_ids),
        predictors_M=tensor(np.concatenate(predictors) if predictors else np.zeros(0, dtype=np.int64)),
        targets_M=tensor(np.array([i for _, c in rows for i in c], dtype=np.int64)),
        mask_NC=tensor(np.arange(width)[None, :] < lengths[:, None]),
        audio_positions_S=tensor(audio),
        audio_keys=() if cached_prompts else tuple(key for p in prompts for key in p.clip_keys),
        prompt_positions=0 if cached_prompts else int(prompt_lengths.sum()),
    )


@dataclass(frozen=True)
class Bucket:
    """Sequences of about the same length as a (B, Lb) block of positions.

    `index` (B*Lb,) positions in the packed row (padding repeats the sequence's first position); `start` is set
    instead when the block is one contiguous run. `valid` (B*Lb,) bool is None without padding.
    """

    rows: int
    length: int
    start: int | None
    index: torch.Tensor | None
    valid: torch.Tensor | None
    places: torch.Tensor | None


def buckets(spans: Sequence[Span], device: torch.device | str, *, slack: float = 0.75, small: int = 32) -> list[Bucket]:
    """Sort sequences by length and cut where one is shorter than `slack` of the longest (never below `small`)."""
    spans = sorted((s for s in spans if s[1] > s[0]), key=lambda s: (s[0] - s[1], s[0]))
    result: list[Bucket] = []
    begin = 0
    while begin < len(spans):
        length = spans[begin][1] - spans[begin][0]
        end = begin
        while end < len(spans) and (length <= small or spans[end][1] - spans[end][0] >= slack * length):
            end += 1
        result.append(_bucket(spans[begin:end], length, device))
        begin = end
    return result


def _bucket(spans: Sequence[Span], length: int, device: torch.device | str) -> Bucket:
    starts = np.array([s for s, _ in spans])
    lengths = np.array([e - s for s, e in spans])
    padded = bool((lengths < length).any())
    if not padded and bool((np.diff(starts) == length).all()):
        return Bucket(len(spans), length, int(starts[0]), None, None, None)
    steps = np.arange(length)
    valid = steps[None, :] < lengths[:, None]
    index = torch.from_numpy((starts[:, None] + np.where(valid, steps, 0)).ravel()).to(device)
    if not padded:
        return Bucket(len(spans), length, None, index, None, None)
    places = torch.from_numpy(np.flatnonzero(valid)).to(device)
    return Bucket(len(spans), length, None, index, torch.from_numpy(valid.ravel()).to(device), places)
