"""The encoder of Covo-Audio on a stream: 0.16 s of sound in, one feature out, the same weights.

    chunk of samples -> mel, floored by the past -> two convolutions -> layers, `left_chunks` back -> adapter -> feature

Of the 16 mel frames of chunk k the convolutions need one more, so feature k is complete 12.5 ms (at 24 kHz 12.9 ms)
after the chunk's end, and nothing later reaches it. Besides the mel's floor, two things differ from whole clips:

- encoder frame j has row j mod `max_source_positions` of the positions;
- frame j attends to frame i where 0 <= j // 8 - i // 8 <= `left_chunks`: whole chunks, both ways within its own.

`offline_features` is the definition, on whole streams with a mask, and trains; `push` computes the same from
what it remembers, chunk by chunk. Weights that were trained on whole clips need fine-tuning for this mask.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from covo_rl.models.covo_audio.configuration import LEFT_CHUNKS
from covo_rl.models.covo_audio.streaming_mel import StreamingMel

DENSE_ATTENTION = ("sdpa", "eager")  # those that take a mask of any form
#: chunks that a layer computes at once of a whole stream, at least: 32 s, and no fewer than four times those it sees
WINDOW_CHUNKS = 200


@dataclass(frozen=True)
class StreamState:
    """What B sessions in step remember. Its tensors are never written to, so forks share them.

    `audio_BT` samples from the first one on that the next chunk needs; `peak_B` the mel's m before that chunk;
    `mel_BM1`, `conv_BD1` the frame before it; `keys`, `values` per layer (B, heads, frames, D / heads); `stages` per
    adapter stage its last input (B, 1, D). `samples` and `chunks` so far; `is_single`: samples come as (n,).
    """

    audio_BT: torch.Tensor
    peak_B: torch.Tensor
    mel_BM1: torch.Tensor
    conv_BD1: torch.Tensor
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    stages: Sequence[torch.Tensor]
    is_single: bool
    samples: int = 0
    chunks: int = 0
    ended: bool = False


class _Past:
    """What Whisper's attention asks of a cache, for one layer."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # under autocast the projections are narrower than the weights, whose dtype the empty ones have
        self.keys = torch.cat([self.keys.to(keys.dtype), keys], 2)
        self.values = torch.cat([self.values.to(values.dtype), values], 2)
        return self.keys, self.values


class StreamingEncoder:
    """Encoder and adapter of a Covo-Audio `model` on streams.

    `left_chunks` earlier chunks are attended to (None: all, and the memory grows with the stream); `mel_peak` is the
    floor's reference before anything was heard; `sampling_rate` of the samples in Hz: the model's own, 24 kHz, or
    that of its mel, 16 kHz. Streams of several sessions in step are (B, n), that of one is (n,).
    """

    def __init__(
        self, model: Any, left_chunks: int | None = LEFT_CHUNKS, mel_peak: float = 0.0, sampling_rate: int | None = None
    ) -> None:
        if left_chunks is not None and left_chunks < 0:
            raise ValueError(f"left_chunks={left_chunks}: a number of chunks from 0 on, or None for all")
        self.model, self.left_chunks, self.mel_peak = model, left_chunks, mel_peak
        self.mel = StreamingMel(model.config, sampling_rate)
        #: encoder frames of a chunk, each of which is one row of the positions
        self.chunk_positions = model.config.adapter_downsample
        self.state: StreamState | None = None

    @classmethod
    def of(cls, model: Any, sampling_rate: int | None = None) -> StreamingEncoder:
        """With the context of the config's `duplex` section; raises ValueError where it has none."""
        section = model.config.duplex
        if section is None:
            raise ValueError(
                "the model's config has no `duplex` section: `covo-rl duplex prepare` gives it one; or write "
                "StreamingEncoder(model, left_chunks) to stream without"
            )
        return cls(model, section["left_chunks"], section["mel_peak"], sampling_rate)

    # -- whole streams -----------------------------------------------------------------------------------------------

    def offline_features(self, samples: Any) -> torch.Tensor:
        """Streams that are there as a whole, (n,) or (B, n) floats -> (K, D) or (B, K, D), one feature per chunk begun.

        Gradients reach encoder, adapter and samples. Silence follows every stream, so those of different lengths are
        padded with zeros, and each keeps its first `mel.chunks(length)` features. Attention is computed in windows:
        memory grows with the length, with its square only where `left_chunks` is None.
        """
        return self.adapted(self.offline_states(samples))

    def adapted(self, states: torch.Tensor) -> torch.Tensor:
        """The adapter on the frames (F, D) or (B, F, D) of `offline_states` -> features (K, D) or (B, K, D)."""
        states_BFD = states if states.ndim == 3 else states[None]
        if not states_BFD.shape[1]:
            return self._no_features(len(states_BFD), states.ndim == 2)
        features_BKD = self.model.audio_adapter(states_BFD)
        return features_BKD if states.ndim == 3 else features_BKD[0]

    def offline_states(self, samples: Any) -> torch.Tensor:
        """The encoder's part of `offline_features`: frames (F, D) or (B, F, D), `chunk_positions` of each chunk."""
        samples_BT, is_single = self._samples(samples)
        encoder, chunks = self.model.encoder, self.mel.chunks(samples_BT.shape[1])
        if (kind := encoder.config._attn_implementation) not in DENSE_ATTENTION:
            raise ValueError(
                f"the encoder's attention is {kind}, which takes no mask of chunks; write "
                f"model.encoder.set_attn_implementation({DENSE_ATTENTION[0]!r}), or use push"
            )
        if not chunks:
            empty_BFD = encoder.conv1.weight.new_zeros(len(samples_BT), 0, encoder.config.d_model)
            return empty_BFD[0] if is_single else empty_BFD
        mel_BMF = self.mel.whole(samples_BT, self._peak(samples_BT)).to(encoder.conv1.weight.dtype)
        # the convolutions pad with zeros: before the stream as is wanted; after it only the frame that is left out
        # sees them, and the adapter's stages, whose inputs are even in number, never do
        hidden_BDF = F.gelu(encoder.conv1(mel_BMF))[..., :-1]
        hidden_BFD = F.gelu(encoder.conv2(hidden_BDF)).transpose(1, 2) + self._positions(0, chunks)
        hidden_BFD = F.dropout(hidden_BFD, encoder.dropout, encoder.training)
        masks: dict[int, torch.Tensor] = {}
        for layer in encoder.layers:
            if encoder.training and torch.rand([]) < encoder.layerdrop:
                continue
            hidden_BFD = self._layer(layer, hidden_BFD, masks)
        hidden_BFD = encoder.layer_norm(hidden_BFD)
        return hidden_BFD[0] if is_single else hidden_BFD

    def _layer(self, layer: Any, hidden_BFD: torch.Tensor, masks: dict[int, torch.Tensor]) -> torch.Tensor:
        """A layer on all frames, a window at a time behind what its first chunk sees; `masks` by frames of a window."""
        frames, size, seen = hidden_BFD.shape[1], self.chunk_positions, self.left_chunks
        step = frames if seen is None else size * max(WINDOW_CHUNKS, 4 * seen)
        parts = []
        for start in range(0, frames, step):
            before = 0 if seen is None else min(start, size * seen)
            window_BFD = hidden_BFD[:, start - before : start + step]
            length = window_BFD.shape[1]
            if length not in masks:
                masks[length] = self._mask(length // size, hidden_BFD)
            parts.append(layer(window_BFD, masks[length])[:, before:])
        return torch.cat(parts, 1)

    def _mask(self, chunks: int, like: torch.Tensor) -> torch.Tensor:
        """(1, 1, F, F) to add to the attention's scores: 0 where frame j sees frame i, else the lowest number."""
        chunk_K = torch.arange(chunks, device=like.device)
        back_KK = chunk_K[:, None] - chunk_K[None, :]
        sees_KK = (back_KK >= 0) & (back_KK <= (chunks if self.left_chunks is None else self.left_chunks))
        sees_FF = sees_KK.repeat_interleave(self.chunk_positions, 0).repeat_interleave(self.chunk_positions, 1)
        mask_FF = torch.zeros(sees_FF.shape, dtype=like.dtype, device=like.device)
        return mask_FF.masked_fill(~sees_FF, torch.finfo(like.dtype).min)[None, None]

    def _positions(self, chunk: int, chunks: int) -> torch.Tensor:
        """Embeddings (F, D) of the positions of so many chunks from `chunk` on."""
        embedding, size = self.model.encoder.embed_positions, self.chunk_positions
        frames = torch.arange(chunk * size, (chunk + chunks) * size, device=embedding.weight.device)
        return embedding(frames % embedding.num_embeddings)

    # -- sessions ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the stream: the next push begins another."""
        self.state = None

    def fork(self) -> StreamingEncoder:
        """A second encoder that has heard the same and goes on by itself; the weights are shared."""
        return copy.copy(self)

    @torch.no_grad()
    def push(self, samples: Any) -> torch.Tensor:
        """The next samples, (n,) or (B, n) floats -> the features that are now complete, (K, D) or (B, K, D).

        K may be 0. Raises ValueError for samples that cannot be used, other sessions than before, and after `end`.
        """
        samples_BT, is_single = self._samples(samples)
        state = self._begun(len(samples_BT), is_single)
        sessions = len(state.audio_BT)
        if (sessions, state.is_single) != (len(samples_BT), is_single):
            there = "one session, (n,)" if state.is_single else f"{sessions} sessions, ({sessions}, n)"
            raise ValueError(
                f"samples of shape {tuple(np.shape(samples))}, but the stream is of {there}; reset() first"
            )
        audio_BT = torch.cat([state.audio_BT, samples_BT], 1)
        ready = (audio_BT.shape[1] - self.mel.window_samples) // self.mel.chunk_samples + 1
        self.state = replace(state, audio_BT=audio_BT, samples=state.samples + samples_BT.shape[1])
        return self._next_features(max(0, ready))

    @torch.no_grad()
    def end(self) -> torch.Tensor:
        """Silence follows: the features that are still owed, (K, D) or (B, K, D). Raises ValueError the second time."""
        state = self._begun(1, True)
        owed = self.mel.chunks(state.samples) - state.chunks
        silence = (owed - 1) * self.mel.chunk_samples + self.mel.window_samples - state.audio_BT.shape[1]
        audio_BT = F.pad(state.audio_BT, (0, silence)) if owed else state.audio_BT
        self.state = replace(state, audio_BT=audio_BT, ended=True)
        return self._next_features(owed)

    def _begun(self, sessions: int, is_single: bool) -> StreamState:
        """The state, a new one where nothing was heard; silence before it fills what remembers."""
        if self.state is not None:
            if self.state.ended:
                raise ValueError("the stream has ended; reset() begins another")
            return self.state
        encoder = self.model.encoder
        if encoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in encoder.layers):
            raise ValueError(
                "gradient checkpointing is on in training mode: transformers would drop what the stream has heard. "
                "Call model.eval() or model.gradient_checkpointing_disable() first"
            )
        weight, heads = encoder.conv1.weight, encoder.config.encoder_attention_heads
        width = encoder.config.d_model

        def zeros(*shape: int, dtype: torch.dtype = weight.dtype) -> torch.Tensor:
            return torch.zeros(sessions, *shape, dtype=dtype, device=weight.device)

        audio_BT = zeros(self.mel.lead_samples, dtype=torch.float32)
        none = [zeros(heads, 0, width // heads)] * len(encoder.layers)
        stages = [zeros(1, width)] * len(self.model.audio_adapter.downsample_layers)
        mel_BM1, conv_BD1 = zeros(self.mel.mel_bins, 1), zeros(width, 1)
        return StreamState(audio_BT, self._peak(audio_BT), mel_BM1, conv_BD1, none, none, stages, is_single)

    def _next_features(self, chunks: int) -> torch.Tensor:
        assert self.state is not None
        features = [self._chunk() for _ in range(chunks)]
        if not features:
            return self._no_features(len(self.state.audio_BT), self.state.is_single)
        features_BKD = torch.cat(features, 1)
        return features_BKD[0] if self.state.is_single else features_BKD

    def _chunk(self) -> torch.Tensor:
        """Feature (B, 1, D) of the next chunk, whose window of samples is there.

        Every convolution is called as the module that it is, with remembered frames on its left; what its padding
        reaches is cut off.
        """
        state, encoder = self.state, self.model.encoder
        assert state is not None
        mel_BMF, peaks_BF = self.mel.window(state.audio_BT[:, : self.mel.window_samples], state.peak_B)
        mel_BMF, last = mel_BMF.to(encoder.conv1.weight.dtype), self.mel.frames - 1
        conv_BDF = F.gelu(encoder.conv1(torch.cat([state.mel_BM1, mel_BMF], 2)))[..., 1:-1]
        hidden_BDF = F.gelu(encoder.conv2(torch.cat([state.conv_BD1, state.conv_BD1, conv_BDF], 2)))[..., 1:]
        hidden_BFD = hidden_BDF.transpose(1, 2) + self._positions(state.chunks, 1)
        pasts = [_Past(*pair) for pair in zip(state.keys, state.values, strict=True)]
        for layer, past in zip(encoder.layers, pasts, strict=True):
            hidden_BFD = layer(hidden_BFD, None, past_key_values=past)
        hidden_BFD, stages = encoder.layer_norm(hidden_BFD), []
        for stage, before_B1D in zip(self.model.audio_adapter.downsample_layers, state.stages, strict=True):
            stages.append(hidden_BFD[:, -1:])
            hidden_BFD = stage(torch.cat([before_B1D, before_B1D, hidden_BFD], 1))[:, 1:]
        self.state = replace(
            state, audio_BT=state.audio_BT[:, self.mel.chunk_samples :], peak_B=peaks_BF[:, last],
            mel_BM1=mel_BMF[..., last : last + 1], conv_BD1=conv_BDF[..., -1:],
            keys=[self._kept(past.keys) for past in pasts], values=[self._kept(past.values) for past in pasts],
            stages=stages, chunks=state.chunks + 1,
        )  # fmt: skip
        return hidden_BFD

    def _kept(self, past: torch.Tensor) -> torch.Tensor:
        """Of keys or values (B, heads, frames, width) those that the next chunk sees."""
        if self.left_chunks is None:
            return past
        return past[:, :, max(0, past.shape[2] - self.left_chunks * self.chunk_positions) :]

    # -- shapes ------------------------------------------------------------------------------------------------------

    def _samples(self, samples: Any) -> tuple[torch.Tensor, bool]:
        """Checked float32 (B, n) on the encoder's device, and whether it was (n,)."""
        given = torch.as_tensor(samples)
        if not given.is_floating_point() or given.ndim not in (1, 2) or (given.ndim == 2 and not len(given)):
            raise ValueError(
                f"samples of shape {tuple(given.shape)} and {given.dtype}; a stream takes floats in -1 to 1, (n,) of "
                "one session or (B, n) of several"
            )
        if bad := int((~given.isfinite()).sum()):
            raise ValueError(f"{bad} of {given.numel()} samples are NaN or infinite")
        samples_BT = given.to(self.model.encoder.conv1.weight.device, torch.float32)
        return (samples_BT[None], True) if given.ndim == 1 else (samples_BT, False)

    def _peak(self, like_BT: torch.Tensor) -> torch.Tensor:
        return like_BT.new_full((len(like_BT),), self.mel_peak)

    def _no_features(self, sessions: int, is_single: bool) -> torch.Tensor:
        weight = self.model.encoder.conv1.weight
        empty = weight.new_zeros(sessions, 0, self.model.config.llm_config.hidden_size)
        return empty[0] if is_single else empty
