"""What a decoder is asked for: codes, and a prompt of codes, latents and speaker, as rows of one batch.

Tensors, or lists of rows of unequal length; a tensor's trailing -1 is padding. Rows are padded on the right and masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from covo_rl.models.covo_audio.token2wav.configuration import CODE_FRAMES, FlowConfig, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.harmonic import F0_CHANNEL
from covo_rl.types import UserError

#: frames by which the latents of a prompt may run over its codes (published: 3)
OVERRUN = CODE_FRAMES - 1


class CodesError(UserError, ValueError):
    """Codes, a prompt or a speaker that the decoder cannot use."""


@dataclass(frozen=True)
class DecoderInputs:
    """One batch: prompt codes, then target codes. `mask_BL` is None where no row is padded.

    Row i speaks the frames `starts[i]` to `ends[i]` of the sequence.
    """

    codes_BL: torch.Tensor
    mask_BL: torch.Tensor | None
    context_BZE: torch.Tensor
    speaker_BS: torch.Tensor
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def mask_BZ(self) -> torch.Tensor | None:
        return None if self.mask_BL is None else self.mask_BL.repeat_interleave(CODE_FRAMES, dim=1)


def code_rows(codes: Any, size: int, name: str = "codes", first: int = 0) -> list[torch.Tensor]:
    """Rows (L,) int64 on the CPU, of a tensor (B, L) or a list of rows.

    Raises:
        CodesError: no row, or a row without a code or with one outside 0..`size` - 1, named by its position, which
            counts from `first`.
    """
    padded = isinstance(codes, (torch.Tensor, np.ndarray))  # a list has no padding
    if padded and codes.ndim != 2:
        raise CodesError(f"{name} of shape {tuple(codes.shape)}; expected (B, L), or a list of rows")
    try:
        tensors = [torch.as_tensor(row).cpu() for row in codes]
    except (TypeError, ValueError, RuntimeError) as error:
        raise CodesError(f"{name} are no rows of whole numbers: {error!s:.200}") from error
    if not tensors:
        raise CodesError(f"{name}: no row")
    rows = []
    for i, tensor in enumerate(tensors):
        if tensor.ndim != 1:
            raise CodesError(f"{name}, row {i}: of shape {tuple(tensor.shape)}; expected (L,), as in [[3, 1, 4]]")
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise CodesError(f"{name}, row {i}: {tensor.dtype} are no codes; give whole numbers")
        row = tensor.long()
        if padded:
            row = row[: len(row) - int((row != -1).flip(0).cumsum(0).eq(0).sum())]
        if not len(row):
            raise CodesError(f"{name}, row {i}: no code; a decoder speaks at least one (40 ms)")
        wrong = ((row < 0) | (row >= size)).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            raise CodesError(
                f"{name}, row {i}, position {first + at}: code {int(row[at])} is outside 0..{size - 1}. "
                "Is it an id of the vocabulary (code 0 is `audio_token_index`), or of another tokenizer?"
            )
        rows.append(row)
    return rows


def decoder_inputs(
    config: FlowConfig, like: torch.Tensor, codes: Any, prompt_codes: Any, prompt_latent: Any, speaker: Any
) -> DecoderInputs:
    """The batch on the device and in the dtype of `like`; a prompt or speaker of one row is everybody's.

    Raises:
        CodesError: numbers of rows differ, or shapes are not the decoder's, or latents and codes of a prompt differ
            in length by more than the published overrun of 3 frames.
    """
    rows = code_rows(codes, config.token_vocab_size)
    count, width = len(rows), config.z_dim
    prompts = [torch.empty(0, dtype=torch.long)] * count
    if prompt_codes is not None:
        prompts = _for_each(code_rows(prompt_codes, config.token_vocab_size, "prompt_codes"), count, "prompt_codes")
    elif prompt_latent is not None:
        raise CodesError("prompt_latent without prompt_codes: a prompt is both, 4 latent frames a code")
    contexts = [torch.zeros(CODE_FRAMES * len(row), width) for row in prompts]
    if prompt_latent is not None:
        contexts = _for_each([torch.as_tensor(row) for row in prompt_latent], count, "prompt_latent")
    for i, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
        frames = CODE_FRAMES * len(prompt)
        if context.ndim != 2 or context.shape[1] != width or not 0 <= len(context) - frames <= OVERRUN:
            raise CodesError(f"prompt_latent, row {i}: {tuple(context.shape)} for {len(prompt)} prompt codes; expected "
                             f"({frames} to {frames + OVERRUN}, {width}): 4 frames a code")  # fmt: skip
    speakers = [torch.zeros(config.spkr_embed_dim)] * count
    if speaker is not None:
        speakers = _for_each([torch.as_tensor(row) for row in speaker], count, "speaker")
    if wrong := [i for i, row in enumerate(speakers) if row.shape != (config.spkr_embed_dim,)]:
        raise CodesError(f"speaker, row {wrong[0]}: {tuple(speakers[wrong[0]].shape)}; expected "
                         f"({config.spkr_embed_dim},)")  # fmt: skip
    whole = [torch.cat([prompt, row]) for prompt, row in zip(prompts, rows, strict=True)]
    lengths = torch.tensor([len(row) for row in whole])
    longest = int(lengths.max())
    mask = None if bool((lengths == longest).all()) else torch.arange(longest) < lengths[:, None]
    context_BZE = like.new_zeros(count, CODE_FRAMES * longest, width)
    for i, context in enumerate(contexts):
        context_BZE[i, : len(context)] = context.to(like)
    return DecoderInputs(
        pad_sequence(whole, batch_first=True, padding_value=-1).to(like.device),
        None if mask is None else mask.to(like.device),
        context_BZE,
        torch.stack(speakers).to(like),
        tuple(map(len, contexts)),
        tuple(CODE_FRAMES * int(length) for length in lengths),
    )


def _for_each(rows: list[torch.Tensor], count: int, name: str) -> list[torch.Tensor]:
    if len(rows) not in (1, count):
        raise CodesError(f"{name}: {len(rows)} rows for {count} rows of codes; give one for all or one each")
    return rows if len(rows) == count else rows * count


def frame_noise(frames: range, config: Token2WavConfig, seed: int) -> torch.Tensor:
    """Standard normal (len(frames), E) float32: each frame's row depends on `seed` and its number alone.

    F0 of `mel_pitch` begins at its mean instead, and so comes out as the likeliest contour rather than a drawn one.
    """
    rows = np.empty((len(frames), config.flow.z_dim), dtype=np.float32)
    for row, frame in zip(rows, frames, strict=True):
        np.random.default_rng((seed, frame)).standard_normal(out=row, dtype=np.float32)
    if config.latent == "mel_pitch":
        rows[:, F0_CHANNEL] = 0
    return torch.from_numpy(rows)
