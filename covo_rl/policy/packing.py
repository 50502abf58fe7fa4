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

from covo_rl.types import Group, Prompt, visible

Span = tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """One packed row of L tokens. All index tensors are int64 on one device.

    `prompts` are the unique prompts in packing order with `prompt_spans`; `row_spans[n]` are the completion inputs
    of row n (caller's order, may be empty) and `row_prompts[n]` its prompt. `predictors_M` is the position whose
    hidden state predicts `targets_M`, over all completion ids in the caller's order; `mask_NC` holds their places, and
    `places_M` numbers them.
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
    places_M: torch.Tensor
    audio_positions_S: torch.Tensor
    audio_keys: tuple[str, ...]
    prompt_positions: int


def identity(prompt: Prompt) -> Hashable:
    """Two prompts with the same ids and the same clips are the same prompt."""
    return prompt.input_ids, prompt.clip_keys


def unique_prompts(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """Unique prompts, and for every given prompt the index of its unique one."""
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(identity(prompt), len(numbers)) for prompt in prompts]
    return [prompts[index.index(number)] for number in range(len(numbers))], index


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
    lengths = [len(prompt.input_ids) for prompt in prompts]
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    prompt_spans = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    # in the cached form the hidden states are [last position of each prompt | completions]
    packed_prompts, offset = ([], len(prompts)) if cached_prompts else (prompts, 0)
    last = range(len(prompts)) if cached_prompts else [end - 1 for end in ends]
    ids = [i for prompt in packed_prompts for i in prompt.input_ids]
    positions = [np.arange(len(prompt.input_ids)) for prompt in packed_prompts]
    audio = [place for place, i in enumerate(ids) if i == audio_token_id]
    prompt_positions = len(ids)
    spans: list[Span] = [(0, 0)] * len(rows)
    for n in sorted(range(len(rows)), key=lambda n: rows[n][0]):
        prompt, completion = rows[n]
        spans[n] = (len(ids), len(ids) + len(completion) - 1)
        ids += completion[:-1]
        positions.append(lengths[prompt] + np.arange(len(completion) - 1))
    predictors = [
        np.concatenate(([last[prompt]], np.arange(*span) + offset))
        for (prompt, _), span in zip(rows, spans, strict=True)
    ]
    counts = np.array([len(completion) for _, completion in rows], dtype=np.int64)
    mask = np.arange(counts.max(initial=0))[None, :] < counts[:, None]

    def tensor(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def joined(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts])).to(device)

    return Packed(
        prompts=tuple(prompts), prompt_spans=tuple(prompt_spans), row_spans=tuple(spans),
        row_prompts=tuple(prompt for prompt, _ in rows),
        input_ids_L=tensor(ids), position_ids_L=joined(positions),
        predictors_M=joined(predictors), targets_M=tensor([i for _, completion in rows for i in completion]),
        mask_NC=torch.from_numpy(mask).to(device), places_M=torch.from_numpy(np.flatnonzero(mask)).to(device),
        audio_positions_S=tensor(audio), prompt_positions=prompt_positions,
        audio_keys=tuple(key for prompt in packed_prompts for key in prompt.clip_keys),
    )  # fmt: skip


def check_sampled(groups: Sequence[Group], unsampled_ids: Sequence[int]) -> None:
    """Raises ValueError that names the row where a completion holds an id that the family never draws."""
    never = set(unsampled_ids)
    for group in groups if never else ():
        for rollout in group.rollouts:
            if ids := never.intersection(rollout.completion_ids):
                row, ids = visible(group.prompt.example.id), sorted(ids)[:8]
                raise ValueError(f"row {row}: a completion holds ids {ids}, which this model never draws")


@dataclass(frozen=True)
class Bucket:
    """Sequences of about the same length as a block of B rows of Lb positions.

    `start` is set where the block is one run of positions of the packed row; elsewhere `index` (B*Lb,) has them, and
    padding repeats the sequence's first one. `places` are the entries of the block without padding (None: all).
    """

    rows: int
    length: int
    start: int | None = None
    index: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def take(self, x_LHd: torch.Tensor) -> torch.Tensor:
        """(L, H, d) -> (B, H, Lb, d) of the bucket; a view where it is one run of positions."""
        if self.index is None:
            block = x_LHd.narrow(0, self.start or 0, self.rows * self.length)
        else:
            block = x_LHd.index_select(0, self.index)
        return block.unflatten(0, (self.rows, self.length)).transpose(1, 2)

    def put(self, target_LHd: torch.Tensor, block_BHLd: torch.Tensor) -> None:
        """Inverse of `take` into a tensor that holds all positions; padding is dropped, gradients flow."""
        flat, index = block_BHLd.transpose(1, 2).flatten(0, 1), self.index
        if index is None:
            target_LHd.narrow(0, self.start or 0, len(flat)).copy_(flat)
            return
        if self.places is not None:
            index, flat = index[self.places], flat[self.places]
        target_LHd.index_copy_(0, index, flat)


def buckets(spans: Sequence[Span], device: torch.device | str, *, slack: float = 0.75, small: int = 32) -> list[Bucket]:
    """Sort sequences by length and cut where one is shorter than `slack` of the longest (never below `small`)."""
    spans = sorted((s for s in spans if s[1] > s[0]), key=lambda s: (s[0] - s[1], s[0]))
    blocks: list[Bucket] = []
    while spans:
        length = spans[0][1] - spans[0][0]
        starts, ends = np.array([s for s in spans if length <= small or s[1] - s[0] >= slack * length]).T
        spans = spans[len(starts) :]
        valid = np.arange(length) < (ends - starts)[:, None]
        if valid.all() and (np.diff(starts) == length).all():
            blocks.append(Bucket(len(starts), length, start=int(starts[0])))
            continue
        index = torch.from_numpy((starts[:, None] + np.where(valid, np.arange(length), 0)).ravel()).to(device)
        places = None if valid.all() else torch.from_numpy(np.flatnonzero(valid)).to(device)
        blocks.append(Bucket(len(starts), length, index=index, places=places))
    return blocks
