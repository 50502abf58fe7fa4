"""Speech to 25 codes a second, whose three training tasks made them words and melody rather than voice.

    wave 24 kHz -> WavLM, all layers -> two frames a code -> code_dim numbers -> nearest of K directions

WavLM (arXiv 2110.13900) with the layers' weighted sum of SUPERB; one vector quantiser by cosine. The published
tokenizer (arXiv 2602.09823) was not released: `train_tokenizer.py` makes one.

    tokenizer = SpeechTokenizer.from_pretrained(FOLDER)
    codes = tokenizer.encode([wave])[0]
    tokenizer.transcribe(codes)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import WavLMModel

from covo_rl.data.noise import quiet
from covo_rl.models import damage_named
from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio.token2wav.checkpoint import fill
from covo_rl.models.weights import WeightsError
from covo_rl.speech.configuration import SpeechTokenizerConfig
from covo_rl.speech.front_end import MelFrontEnd, prepare_wave
from covo_rl.speech.grid import CODE_FRAMES, CodeError, check_codes
from covo_rl.speech.heads import Heads
from covo_rl.speech.pieces import Pieces

#: codes of one batch of `encode`, padding included: two minutes
BATCH_CODES = 3000
CONFIG, WEIGHTS, PIECES = "config.json", "model.safetensors", "pieces.json"
_HEADS = "heads."


class SpeechTokenizer(nn.Module):
    """`codebook` (K, code_dim): unit vectors. `pieces` is how its CTC head writes; None where it has no heads."""

    codebook: Tensor

    def __init__(self, config: SpeechTokenizerConfig, pieces: Pieces | None = None) -> None:
        super().__init__()
        if pieces is not None and len(pieces) != config.pieces:
            raise CodeError(f"config: pieces {config.pieces}, and {PIECES} has {len(pieces)}")
        self.config, self.pieces = config, pieces
        wavlm = config.wavlm_config()
        self.wavlm: Any = WavLMModel(wavlm)
        if config.front_end == "mel":
            self.wavlm.feature_extractor = MelFrontEnd()
        self.layer_weights = nn.Parameter(torch.zeros(wavlm.num_hidden_layers + 1))
        self.merge = nn.Linear(2 * wavlm.hidden_size, config.merge_width)
        self.norm = nn.LayerNorm(config.merge_width)
        self.to_code = nn.Linear(config.merge_width, config.code_dim)
        self.from_code = nn.Linear(config.code_dim, config.merge_width)
        self.heads = None if pieces is None else Heads(config.merge_width, config.head_width, config.pieces)
        self.register_buffer("codebook", F.normalize(torch.randn(config.codebook_size, config.code_dim), dim=-1))

    # -- encoding ------------------------------------------------------------------------------------------------------

    def features(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Prepared waves -> unit vectors (B, L, code_dim) before the codebook, and which are real (B, L) bool."""
        device = self.codebook.device
        lengths = torch.tensor([len(wave) for wave in inputs], device=device)
        waves_BT = nn.utils.rnn.pad_sequence(list(inputs), batch_first=True).to(device, self.merge.weight.dtype)
        mask_BT = torch.arange(waves_BT.shape[1], device=device) < lengths[:, None]
        grouped = getattr(self.wavlm.config, "feat_extract_norm", "") == "group" and self.config.front_end == "conv"
        if grouped and len(inputs) > 1:  # its first norm is over time, padding included
            alone = [self.features([wave]) for wave in inputs]
            pad = nn.utils.rnn.pad_sequence
            return tuple(pad([part[i][0] for part in alone], batch_first=True) for i in (0, 1))  # pyright: ignore
        out = self.wavlm(waves_BT, attention_mask=mask_BT.long(), output_hidden_states=True)
        weights = self.layer_weights.softmax(0)
        frames_BFW: Any = sum(weight * hidden for weight, hidden in zip(weights, out.hidden_states, strict=True))
        merged = self.norm(self.merge(frames_BFW.reshape(len(inputs), frames_BFW.shape[1] // 2, -1)))
        counts = self.wavlm._get_feat_extract_output_lengths(lengths) // 2
        mask_BL = torch.arange(merged.shape[1], device=device) < counts[:, None]
        return F.normalize(self.to_code(merged).float(), dim=-1), mask_BL

    @torch.no_grad()
    def encode(self, waves: Sequence[Tensor | np.ndarray]) -> list[Tensor]:
        """Mono waves (T,) at 24 kHz -> codes int64 (ceil(T / 960),) on the CPU, in any batch what they are alone.

        Raises:
            ValueError: a wave without samples, of several channels, with NaN or infinities.
        """
        if isinstance(waves, (Tensor, np.ndarray)) and waves.ndim == 1:
            raise ValueError(f"one wave of shape {tuple(waves.shape)}: give a list of waves, [wave]")
        inputs = [prepare_wave(wave, self.config.front_end) for wave in waves]
        codes: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        was_training = self.training
        self.eval()
        try:
            while order:
                size = max(1, int(BATCH_CODES / self._codes(inputs[order[-1]])))
                batch, order = order[-size:], order[:-size]
                vectors_BLC, mask_BL = self.features([inputs[i] for i in batch])
                for i, row, mask in zip(batch, self.nearest(vectors_BLC), mask_BL, strict=True):
                    codes[i] = row[mask].cpu()
        finally:
            self.train(was_training)
        return codes

    def _codes(self, wave_T: Tensor) -> float:
        return int(self.wavlm._get_feat_extract_output_lengths(len(wave_T))) / 2

    def nearest(self, vectors: Tensor) -> Tensor:
        """Unit vectors (..., code_dim) -> int64 (...), the code of the nearest direction."""
        return (vectors @ self.codebook.to(vectors).T).argmax(-1)

    # -- reading codes -------------------------------------------------------------------------------------------------

    def embed(self, codes_BL: Tensor) -> Tensor:
        """Codes -> embeddings (B, L, W), which the heads read."""
        return self.from_code(self.codebook[codes_BL].to(self.from_code.weight.dtype))

    @torch.no_grad()
    def ctc_logps(self, codes: Sequence[int] | Tensor) -> Tensor:
        """Log-probabilities (L, pieces) float32 of the words of one row of codes; output 0 is the blank.

        Raises:
            CodeError: no codes, a code outside the codebook, or a tokenizer without heads.
        """
        heads, _ = self.reader()
        return heads.asr(*self._embedded(codes))[0].float().log_softmax(-1)

    @torch.no_grad()
    def contour(self, codes: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Voicing probability and log2 F0 relative to the clip's voiced mean, (4L,) float32 each.

        Raises:
            CodeError: as `ctc_logps`.
        """
        heads, _ = self.reader()
        voicing_BZ, octaves_BZ = heads.read_pitch(*self._embedded(codes))
        return voicing_BZ[0].float().sigmoid(), octaves_BZ[0].float()

    @torch.no_grad()
    def loud(self, codes: Sequence[int] | Tensor) -> Tensor:
        """Which codes (L,) bool sound nearer to the clip's loudest than to its most quiet, in an average voice.

        Raises:
            CodeError: as `ctc_logps`.
        """
        heads, _ = self.reader()
        embeds_BLW, mask_BL = self._embedded(codes)
        drawn_BZE = heads.draw_mel(embeds_BLW, torch.zeros_like(heads.mean_E)[None], mask_BL)
        level_L = drawn_BZE[0].float().mean(-1).reshape(-1, CODE_FRAMES).mean(-1)
        return level_L > (level_L.min() + level_L.max()) / 2

    def _embedded(self, codes: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of one row (1, L, W), all of them real."""
        values = codes.tolist() if isinstance(codes, (Tensor, np.ndarray)) else list(codes)
        if not values:
            raise CodeError("no codes: there is nothing to read")
        check_codes([values], len(self.codebook))
        codes_BL = torch.tensor([values], device=self.codebook.device)
        return self.embed(codes_BL), torch.ones_like(codes_BL, dtype=torch.bool)

    def transcribe(self, codes: Sequence[int] | Tensor) -> str:
        """The words of codes, read without audio: greedy CTC. Raises CodeError as `ctc_logps`; no codes: no words."""
        if not len(codes):
            return ""
        return self.reader()[1].greedy(self.ctc_logps(codes).argmax(-1).tolist())

    def reader(self) -> tuple[Heads, Pieces]:
        """What reads codes; raises CodeError where this tokenizer was saved without."""
        if self.heads is None or self.pieces is None:
            raise CodeError("this tokenizer was saved without heads and cannot read codes: train one, or name another")
        return self.heads, self.pieces

    # -- files ---------------------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """16 hex digits of all that decides codes: configuration and weights but the heads'. Rows of codes carry it."""
        digest = hashlib.sha256(json.dumps([self.config.front_end, self.config.wavlm], sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            if not name.startswith(_HEADS):
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """config.json, model.safetensors and, with heads, pieces.json; `dtype` narrows what is written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().to("cpu", dtype or value.dtype).contiguous()
                   for name, value in self.state_dict().items()}  # fmt: skip
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if self.pieces is not None:
            self.pieces.write(folder / PIECES)
        self.config.write(folder / CONFIG)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> SpeechTokenizer:
        """A saved tokenizer, or `builtin:speech_tokenizer`; float32, in eval mode.

        Raises:
            ConfigError, ModelError: config.json is missing, malformed, or has impossible values.
            PiecesError: pieces.json is missing or damaged.
            WeightsError: tensors are missing, left over, of another shape, or not finite; the message names them.
        """
        quiet()
        path = Path(resolve_model(str(folder)))
        config = SpeechTokenizerConfig.read(path / CONFIG)
        try:
            tensors = load_file(path / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path / WEIGHTS} cannot be read: {error}") from error
        with_heads = any(name.startswith(_HEADS) for name in tensors)
        pieces = Pieces.read(path / PIECES) if with_heads else None
        with damage_named(str(path)), torch.device("meta"):  # no memory before shapes are those of the file
            model = cls(config, pieces)
        fill(model, tensors, str(path / WEIGHTS), torch.float32)
        return model.to(device).eval()
