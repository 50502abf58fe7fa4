"""Token2Wav: audio codes -> latents (`solve`, `latents`) -> wave (`vocode`), whole (`synthesise`) or as a stream.

decoder = Token2Wav.from_pretrained("token2wav")
wave = decoder.synthesise(codes, prompt_codes=..., prompt_latent=..., speaker=...)  # (B, 1, 960 L) at 24 kHz
for piece in decoder.stream(codes_as_they_come):  # (1, 1, samples)
    ...
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from covo_rl.models.covo_audio.token2wav.checkpoint import (
    STATISTICS,
    fill,
    read_statistics,
    read_weights,
    write_folder,
)  # fmt: skip
from covo_rl.models.covo_audio.token2wav.configuration import CODE_FRAMES, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.flow import FlowField
from covo_rl.models.covo_audio.token2wav.harmonic import HarmonicVocoder
from covo_rl.models.covo_audio.token2wav.inputs import CodesError, DecoderInputs, decoder_inputs, frame_noise
from covo_rl.models.covo_audio.token2wav.mel import MEL_BINS
from covo_rl.models.covo_audio.token2wav.solver import guide, midpoint
from covo_rl.models.covo_audio.token2wav.stream import BLOCKS, LOOK_AHEAD, PAST, latent_blocks, overlapped
from covo_rl.models.covo_audio.token2wav.vocoder import GriffinLim, Vocoder

logger = logging.getLogger("covo_rl.models")


class Token2Wav(nn.Module):
    """The decoder. `token2latent` is the vector field, `wavegan` the vocoder; both train as any module does.

    The prompt says who speaks: `prompt_codes` (B, P), `prompt_latent` (B, 4P, E), normalised, and `speaker` (B, S);
    one row serves a whole batch. Rows of unequal length come as lists, or padded with -1 on the right; each row's
    result is what it would be alone, and behind it there are zeros.
    """

    mean_E: torch.Tensor
    variance_E: torch.Tensor

    def __init__(self, config: Token2WavConfig) -> None:
        super().__init__()
        self.config = config
        self.token2latent = FlowField(config.flow)
        self.wavegan = (
            GriffinLim() if config.vocoder == "griffin_lim" else HarmonicVocoder(config.harmonic_width)
            if config.vocoder == "harmonic" else Vocoder(config.wavegan, config.flow.z_dim)
        )  # fmt: skip
        self.register_buffer("mean_E", torch.zeros(config.flow.z_dim), persistent=False)
        self.register_buffer("variance_E", torch.ones(config.flow.z_dim), persistent=False)
        self._told = False

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """The decoder of a folder, for inference (`eval`); float16 or bfloat16 files become `dtype` too.

        Raises:
            WeightsError: a file is missing or damaged, or tensors are missing, unknown or of other shapes.
        """
        folder = Path(folder)
        config = Token2WavConfig.from_file(folder / "config.json")
        statistics = read_statistics(folder / STATISTICS, config.flow.z_dim)
        with torch.device("meta"):
            model = cls(config)
        fill(model, read_weights(folder), str(folder), dtype)
        model.mean_E, model.variance_E = statistics
        return model.to(device).eval()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """config.json, model.safetensors (in `dtype`, else as it is) and global_mean_var.npy, by published names."""
        tensors = {name: value.to(dtype or value.dtype) for name, value in self.state_dict().items()}
        statistics = torch.cat([self.mean_E, self.variance_E]).float().cpu().numpy()
        write_folder(Path(folder), self.config.to_dict(), tensors, statistics)

    def normalise(self, latents_BZE: torch.Tensor) -> torch.Tensor:
        """Latents as they are, for example a mel -> mean 0, variance 1, as a prompt's are."""
        return (latents_BZE - self.mean_E) / self.variance_E.sqrt()

    def denormalise(self, x_BZE: torch.Tensor) -> torch.Tensor:
        return self.mean_E + x_BZE * self.variance_E.sqrt()

    def check_tokenizer(self, digest: str) -> None:
        """Raise CodesError where the codes come from another tokenizer (`digest`) than this decoder was trained on."""
        if digest and self.config.tokenizer and digest != self.config.tokenizer:
            raise CodesError(f"codes of tokenizer {digest}, but this decoder speaks those of {self.config.tokenizer}: "
                             "encode again, or take that tokenizer's decoder")  # fmt: skip

    @torch.no_grad()
    def solve(
        self, codes: Any, *, prompt_codes: Any = None, prompt_latent: Any = None, speaker: Any = None,
        noise: torch.Tensor | None = None, steps: int = 10, alpha: float | None = 1.0, rescale: bool = False,
        seed: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """Codes int64 (B, L) -> normalised latents (B, 4(P+L), E) of prompt and target, float32.

        `steps` points of time: 10 are 9 intervals and 18 evaluations. `alpha` guides towards the codes, None does
        without (half the work); `rescale` keeps the spread of the unguided velocity. `noise` (B, 4(P+L), E), else
        each frame's own of `seed`, the same in every row.

        Raises:
            CodesError: codes, prompt or speaker cannot be used.
            LatentError: the latents are not finite.
        """
        inputs = self._inputs(codes, prompt_codes, prompt_latent, speaker)
        return self._solve(inputs, noise, steps=steps, alpha=alpha, rescale=rescale, seed=seed)

    @torch.no_grad()
    def latents(
        self, codes: Any, *, prompt_codes: Any = None, prompt_latent: Any = None, speaker: Any = None,
        noise: torch.Tensor | None = None, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        """As `solve`, de-normalised and without the prompt's frames: (B, 4L, E), less what its latents overran."""
        inputs = self._inputs(codes, prompt_codes, prompt_latent, speaker)
        return nn.utils.rnn.pad_sequence(self._targets(inputs, noise, options), batch_first=True)

    @torch.no_grad()
    def vocode(self, latents_BEZ: torch.Tensor) -> torch.Tensor:
        """De-normalised latents (B, E, Z) -> wave (B, 1, 240 Z) float32 at 24 kHz (float64 where the model is).

        Raises:
            CodesError: latents of another shape.
        """
        width = self.config.flow.z_dim
        if latents_BEZ.ndim != 3 or latents_BEZ.shape[1] != width or not latents_BEZ.shape[2]:
            raise CodesError(f"latents of shape {tuple(latents_BEZ.shape)}; expected (B, {width}, frames)")
        return self._sound(self.wavegan(latents_BEZ))

    @torch.no_grad()
    def synthesise(
        self, codes: Any, *, prompt_codes: Any = None, prompt_latent: Any = None, speaker: Any = None,
        noise: torch.Tensor | None = None, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Codes (B, L) -> wave (B, 1, 960 L) at 24 kHz, less 240 samples a frame of the prompt's overrun.

        Options as of `solve`.
        """
        inputs = self._inputs(codes, prompt_codes, prompt_latent, speaker)
        rows = self._targets(inputs, noise, options)
        if len({len(row) for row in rows}) == 1:
            return self.vocode(torch.stack(rows).mT)
        # the vocoder's padding at the end is part of a row's sound: rows of other lengths go by themselves
        waves = [self.vocode(row.T[None])[0, 0] for row in rows]
        return nn.utils.rnn.pad_sequence(waves, batch_first=True)[:, None]

    def stream(
        self, codes: Iterable[int], *, prompt_codes: Any = None, prompt_latent: Any = None, speaker: Any = None,
        blocks: Sequence[int] = BLOCKS, past: int = PAST, look_ahead: int = LOOK_AHEAD, **options: Any,
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        """Wave pieces (1, 1, samples) of one reply while its codes come; together `synthesise`'s length.

        A piece is solved as soon as its block of `blocks` codes (the last size repeats) and `look_ahead` more are
        there, behind the prompt and `past` codes of the reply. A reply of one block is `synthesise`'s exactly.
        Options as of `solve`, without `noise`.

        Raises:
            CodesError: prompt or speaker cannot be used, at once; codes cannot, or there is none, while they come.
        """
        if not blocks or min(*blocks, look_ahead) < 1 or past < 0:
            raise ValueError(f"blocks={tuple(blocks)}, look_ahead={look_ahead}, past={past}: at least 1, 1 and 0 codes")
        prompt = self._inputs([[0]], prompt_codes, prompt_latent, speaker)
        chunks = latent_blocks(self, codes, prompt, blocks, past, look_ahead, **options)
        return map(self._sound, overlapped(self.wavegan, chunks))

    def _sound(self, wave: torch.Tensor) -> torch.Tensor:
        return wave.to(torch.promote_types(wave.dtype, torch.float32))

    def _inputs(self, codes: Any, prompt_codes: Any, prompt_latent: Any, speaker: Any) -> DecoderInputs:
        weight = self.token2latent.token_embedding.weight
        inputs = decoder_inputs(self.config.flow, weight, codes, prompt_codes, prompt_latent, speaker)
        overrun = max(inputs.starts) % CODE_FRAMES
        if overrun and not self._told:
            self._told = True
            logger.info("the prompt's latents run over its codes by %d frames: the first %d ms of a reply are lost, as "
                        "with the published voice", overrun, 10 * overrun)  # fmt: skip
        return inputs

    def _targets(
        self, inputs: DecoderInputs, noise: torch.Tensor | None, options: dict[str, Any]
    ) -> list[torch.Tensor]:
        latents = self.denormalise(self._solve(inputs, noise, **options))
        return [row[start:end] for row, start, end in zip(latents, inputs.starts, inputs.ends, strict=True)]

    def _solve(
        self, inputs: DecoderInputs, noise: torch.Tensor | None, steps: int = 10, alpha: float | None = 1.0,
        rescale: bool = False, seed: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        field, weight = self.token2latent, self.token2latent.token_embedding.weight
        context_BZE, speaker_BS, mask_BZ = inputs.context_BZE, inputs.speaker_BS, inputs.mask_BZ
        if noise is None:
            noise = frame_noise(range(context_BZE.shape[1]), self.config, seed).expand_as(context_BZE)
        elif noise.shape != context_BZE.shape:
            raise CodesError(f"noise of shape {tuple(noise.shape)}; expected {tuple(context_BZE.shape)}: 4 frames for "
                             "each code of prompt and target")  # fmt: skip
        T_BZW = field.condition(inputs.codes_BL, inputs.mask_BL)
        keys = mask_BZ
        if alpha is not None:  # without codes first, then with them; context and speaker in both
            T_BZW = torch.cat([torch.zeros_like(T_BZW), T_BZW])
            context_BZE, speaker_BS = context_BZE.repeat(2, 1, 1), speaker_BS.repeat(2, 1)
            keys = None if mask_BZ is None else mask_BZ.repeat(2, 1)

        def velocity(x_BZE: torch.Tensor, t: float) -> torch.Tensor:
            x = x_BZE.to(weight.dtype)
            x = x if alpha is None else x.repeat(2, 1, 1)
            v = field(x, torch.full((len(x),), t, device=x.device), T_BZW, context_BZE, speaker_BS, keys).to(x_BZE)
            if alpha is None:
                return v
            unconditional, conditional = v.chunk(2)
            guided = guide(conditional, unconditional, alpha, rescale, mask_BZ)
            if self.config.latent == "mel_pitch":  # guided, its contour would swing too far
                guided = torch.cat([guided[..., :MEL_BINS], conditional[..., MEL_BINS:]], dim=-1)
            return guided

        x_BZE = midpoint(velocity, noise.to(weight.device, torch.promote_types(weight.dtype, torch.float32)), steps)
        return x_BZE if mask_BZ is None else x_BZE * mask_BZ[..., None]
