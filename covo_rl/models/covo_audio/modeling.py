"""Covo-Audio as a batched, trainable transformers model.

Log-mel segments of all clips of a batch go through encoder and adapter in one call; the rows that belong to a clip
replace the embeddings of its audio placeholders; a Qwen2 decoder does the rest. Parameter names are the published
ones (`llm.*`, `encoder.*`, `audio_adapter.*`), so checkpoints load and save unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedModel, Qwen2ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from covo_rl.models.covo_audio.configuration import CovoAudioConfig
from covo_rl.models.covo_audio.generation import CovoAudioGenerationMixin
from covo_rl.models.slots import check_slots, part_output


def _relu(fresh: torch.Tensor) -> torch.Tensor:
    """In place where nothing is recorded: a batch's activations are too large to write twice."""
    return F.relu(fresh, inplace=not fresh.requires_grad)


class CovoAudioDownsample(nn.Module):
    """Half the length: strided convolution, ReLU, Linear, ReLU, Linear; no activation after the last."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, out)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(K, L, width) -> (K, ceil(L / 2), out)."""
        hidden = _relu(self.conv1d(hidden.transpose(1, 2)).transpose(1, 2))
        if hidden.device.type == "cpu" and not hidden.requires_grad and len(hidden) > 1:
            # One segment's hidden activations fit the cache, a batch's do not.
            return torch.cat([self._mlp(segment) for segment in hidden.split(1)])
        return self._mlp(hidden)

    def _mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear2(_relu(self.linear1(hidden)))


class CovoAudioAdapter(nn.Module):
    """log2(adapter_downsample) stages; the last one projects to the decoder's width."""

    def __init__(self, config: CovoAudioConfig) -> None:
        super().__init__()
        width, stages = config.encoder_config.d_model, int(math.log2(config.adapter_downsample))
        outs = [width] * (stages - 1) + [config.llm_config.hidden_size]
        self.downsample_layers = nn.ModuleList(
            CovoAudioDownsample(width, config.adapter_hidden_dim, out) for out in outs
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Encoder states (K, L, width) -> (K, ceil(L / adapter_downsample), D)."""
        for layer in self.downsample_layers:
            hidden = layer(hidden)
        return hidden


@dataclass
class CovoAudioFeatures(BaseModelOutputWithPooling):
    """`last_hidden_state` (K, positions, d_model) of the encoder; `pooler_output` (slots, D), one row per placeholder
    of the batch in order, of which `sizes[a]` belong to the clip in the a-th place."""

    sizes: list[int] | None = None


class CovoAudioForConditionalGeneration(PreTrainedModel, CovoAudioGenerationMixin):
    """Encoder, adapter and decoder with a language-model head over text and audio codes."""

    config: CovoAudioConfig
    config_class = CovoAudioConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["audio", "text"]  # noqa: RUF012 (transformers' form)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "WhisperEncoderLayer"]  # noqa: RUF012 (transformers' form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (transformers' form)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _tied_weights_keys = {}  # noqa: RUF012 (transformers' form); embedding and head are separate tensors

    def __init__(self, config: CovoAudioConfig) -> None:
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config.llm_config)
        self.encoder = WhisperEncoder(config.encoder_config)
        self.audio_adapter = CovoAudioAdapter(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.llm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.llm.model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.llm.model = decoder  # pyright: ignore

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def enable_input_require_grads(self) -> None:
        """Only the token embeddings: a hook on the encoder's input would drag a frozen encoder into autograd."""
        hook = self.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        self._require_grads_hooks, self._require_grads_hook = [hook], hook

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None,
        segment_clips: torch.Tensor | None = None, clip_order: torch.Tensor | None = None, **kwargs: Any,
    ) -> CovoAudioFeatures:  # fmt: skip
        """All segments through encoder and adapter in one call, whatever clips they belong to.

        `input_features` (K, M, F) any float dtype; `input_features_mask` (K, rows) bool, the adapter rows that fill
        slots (default: all). `segment_clips` (K,) says which unique clip a segment belongs to (default: each its
        own); `clip_order` (A,) which unique clip fills the a-th place of the batch, row by row (default: each once).
        Parts whose parameters are all frozen run without autograd.
        """
        features = input_features.to(self.encoder.conv1.weight.device, self.encoder.conv1.weight.dtype)
        encoded = part_output(self.encoder, features).last_hidden_state
        rows = part_output(self.audio_adapter, encoded)
        mask = torch.ones(rows.shape[:2], dtype=torch.bool) if input_features_mask is None else input_features_mask
        owners = list(range(len(rows))) if segment_clips is None else segment_clips.tolist()
        sizes = [0] * (max(owners) + 1)
        for owner, slots in zip(owners, mask.sum(1).tolist(), strict=True):
            sizes[owner] += slots
        rows = rows[mask.to(rows.device, torch.bool)]
        if clip_order is not None:
            clips, order = rows.split(sizes), clip_order.tolist()
            rows, sizes = torch.cat([clips[i] for i in order]), [sizes[i] for i in order]
        return CovoAudioFeatures(last_hidden_state=encoded, pooler_output=rows, sizes=sizes)  # pyright: ignore

    def _embed(self, input_ids: torch.Tensor, past: int, audio_embeds: torch.Tensor | None, audio: Any) -> torch.Tensor:
        """Token embeddings (N, T, D) with audio, the arguments of `get_audio_features`, in the placeholders' places."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        slots = input_ids == self.config.audio_placeholder_token_id
        sizes = [] if audio_embeds is None else [audio_embeds.shape[0]]
        if audio_embeds is None and audio[0] is not None:
            features = self.get_audio_features(*audio)
            audio_embeds, sizes = features.pooler_output, features.sizes
        elif audio_embeds is None and past:
            return inputs_embeds  # a placeholder that was sampled is a token like any other
        check_slots(slots.sum(1).tolist(), sizes or [])
        if audio_embeds is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(
            slots[..., None].to(inputs_embeds.device), audio_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        )

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None, labels: torch.Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0, input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None, segment_clips: torch.Tensor | None = None,
        clip_order: torch.Tensor | None = None, audio_embeds: torch.Tensor | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits over text and audio codes; with `labels` (-100 is ignored) the shifted mean cross entropy.

        `input_ids` (N, T) with one placeholder per audio slot; `attention_mask` (N, T) or (N, history + T); audio as
        `input_features` and its companions (see `get_audio_features`), or ready-made as `audio_embeds` (slots, D).
        `logits_to_keep` positions from the end, or a tensor of positions. Further keyword arguments reach the
        attention functions. Raises ValueError that names the row when slots and features do not match.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past and self.training and getattr(self.llm.model, "gradient_checkpointing", False):
            raise ValueError(
                "a key/value cache was given while gradient checkpointing is on in training mode: transformers would "
                "drop the cache silently. Call model.eval() or model.gradient_checkpointing_disable() first"
            )
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            audio = (input_features, input_features_mask, segment_clips, clip_order)
            inputs_embeds = self._embed(input_ids, past, audio_embeds, audio)
        elif input_features is not None or audio_embeds is not None:
            raise ValueError("inputs_embeds already hold the audio: give them without input_features or audio_embeds")
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        llm: Any = self.llm
        return llm(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
            past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
