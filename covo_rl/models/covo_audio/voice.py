"""Who speaks an answer's codes: a decoder, with the prompt of a speaker or without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covo_rl.models.covo_audio.token2wav import Token2Wav
from covo_rl.models.covo_audio.token2wav.inputs import CodesError

#: argument of a decoder -> the file of it in a speaker's folder, as published
PROMPT_FILES = {
    "prompt_codes": "prompt_token.npy", "prompt_latent": "prompt_latent.npy", "speaker": "speaker_embed.npy",
}  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """A decoder with what it is asked with: `prompt_codes` (1, P), `prompt_latent` (1, 4P, E), `speaker` (1, S), steps,
    alpha, seed ..., the arguments of `Token2Wav.synthesise`."""

    decoder: Token2Wav
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, decoder: Token2Wav, folder: str | Path, **options: Any) -> Voice:
        """The speaker of a folder with prompt_token.npy, prompt_latent.npy and speaker_embed.npy, or some of them.

        Raises:
            CodesError: none is there, or one cannot be read or does not fit the decoder.
        """
        paths = {name: Path(folder) / file for name, file in PROMPT_FILES.items()}
        prompt = {name: _array(path) for name, path in paths.items() if path.is_file()}
        if not prompt:
            raise CodesError(f"{folder} holds no speaker: none of {', '.join(PROMPT_FILES.values())} is there")
        voice = cls(decoder, {**prompt, **options})
        voice.check()
        return voice

    def fit(self, codes: int) -> Voice:
        """Itself, where the decoder speaks all codes of a model with so many.

        Raises:
            CodesError: the decoder knows fewer codes, so it is another model's.
        """
        size = self.decoder.config.flow.token_vocab_size
        if codes < 1:
            raise CodesError("this model has no audio codes: it writes text alone, and nothing of it can be spoken")
        if size < codes:
            raise CodesError(f"the model has {codes} audio codes, the decoder speaks {size}: give the model's own one")
        return self

    def check(self) -> None:
        """Raise CodesError where the prompt does not fit the decoder."""
        self.decoder.stream((), **self.options)  # looks at the prompt at once

    def say(self, codes: Sequence[int]) -> torch.Tensor:
        """Codes (L,) -> wave (T,) float32 at 24 kHz on the CPU; of no codes an empty one."""
        if not codes:
            return torch.zeros(0)
        return _samples(self.decoder.synthesise([list(codes)], **self.options))

    def stream(self, codes: Iterable[int]) -> Iterator[torch.Tensor]:
        """As `say`, in blocks, while the codes come."""
        codes = iter(codes)
        for first in codes:
            yield from map(_samples, self.decoder.stream(chain([first], codes), **self.options))


def _array(path: Path) -> torch.Tensor:
    """A batch of one row; mapped first, so that a damaged header asks for no memory."""
    try:
        array = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise CodesError(f"{path} cannot be read: {error}") from error
    if array.dtype.kind not in "iuf" or array.size == 0 or not np.isfinite(array).all():
        raise CodesError(f"{path} holds {array.dtype} of shape {array.shape}; expected finite numbers")
    rows = torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float32))
    inner = 2 if path.name == PROMPT_FILES["prompt_latent"] else 1
    return rows[None] if rows.ndim == inner else rows


def _samples(wave_11T: torch.Tensor) -> torch.Tensor:
    return wave_11T[0, 0].float().cpu()
