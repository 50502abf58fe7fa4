"""Covo-Audio as a batched, trainable transformers model.

Log-mel segments of all clips of a batch go through encoder and adapter in one call; the rows that belong to a clip
replace the embeddings of its audio placeholders; a Qwen2 decoder does the rest. Parameter names are the published
ones (`llm.*`, `encoder.*`, `audio_adapter.*`), so checkpoints load and save unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel, Qwen2ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from covo_rl.models.covo_audio.configuration import CovoAudioConfig
from covo_rl.models.covo_audio.generation import CovoAudioGenerationMixin
from covo_rl.models.slots import check_slots, trains


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


class CovoAudioPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

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


class CovoAudioForConditionalGeneration(CovoAudioGenerationMixin, CovoAudioPreTrainedModel, GenerationMixin):
    """Encoder, adapter and decoder with a language-model head over text and audio codes."""

    # Embedding and head are separate tensors.
    _tied_weights_keys = {}  # noqa: RUF012 (transformers' form)

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
        self._require_grads_hooks = [hook]
        self._require_grads_hook = hook

    def _audio_rows(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder states (K, positions, d_model) and the kept adapter rows (slots, D)."""
        features = input_features.to(self.encoder.conv1.weight.device, self.encoder.conv1.weight.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.encoder)):
            encoded = self.encoder(features).last_hidden_state
        with torch.set_grad_enabled(torch.is_grad_enabled() and (encoded.requires_grad or trains(self.audio_adapter))):
            rows = self.audio_adapter(encoded)
        if input_features_mask is None:
            return encoded, rows.flatten(0, 1)
        return encoded, rows[input_features_mask.to(rows.device, torch.bool)]

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        segment_clips: torch.Tensor | None = None,
        clip_order: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """All segments through encoder and adapter in one call, whatever clips they belong to.

        Takes the audio fields of the processor (see `get_audio_embeds`). Returns `last_hidden_state`
        (K, positions, d_model) of the encoder and `pooler_output` (slots, D), one row per placeholder in order.
        Parts whose parameters are all frozen run without autograd.
        """
        encoded, rows = self._audio_rows(input_features, input_features_mask)
        rows, _ = self._in_order(rows, input_features, input_features_mask, segment_clips, clip_order)
        return BaseModelOutputWithPooling(last_hidden_state=encoded, pooler_output=rows)  # pyright: ignore

    def get_audio_embeds(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        segment_clips: torch.Tensor | None = None,
        clip_order: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Embeddings (slots, D) in the order of the placeholders, and the slots of each clip placed.

        `input_features` (K, M, F) any float dtype; `input_features_mask` (K, rows) bool, the adapter rows that fill
        slots (default: all). `segment_clips` (K,) says which unique clip a segment belongs to (default: each its
        own); `clip_order` (A,) which unique clip fills the a-th place of the batch, row by row (default: each once).
        """
        _, rows = self._audio_rows(input_features, input_features_mask)
        return self._in_order(rows, input_features, input_features_mask, segment_clips, clip_order)

    @staticmethod
    def _in_order(
        rows: torch.Tensor,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None,
        segment_clips: torch.Tensor | None,
        clip_order: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[int]]:
        count = input_features.shape[0]
        per_segment = [rows.shape[0] // count] * count
        if input_features_mask is not None:
            per_segment = input_features_mask.sum(1).tolist()
        owners = list(range(count)) if segment_clips is None else segment_clips.tolist()
        sizes = [0] * (max(owners) + 1)
        for owner, slots in zip(owners, per_segment, strict=True):
            sizes[owner] += slots
        if clip_order is None:
            return rows, sizes
        order = clip_order.tolist()
        clips = rows.split(sizes)
        return torch.cat([clips[i] for i in order]), [sizes[i] for i in order]

    def _embed(
        self, input_ids: torch.Tensor, past: int, audio_embeds: torch.Tensor | None, audio: dict[str, Any]
    ) -> torch.Tensor:
        """Token embeddings (N, T, D) with audio in the placeholders' places."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        slots = input_ids == self.config.audio_placeholder_token_id
        sizes: list[int] = []
        if audio_embeds is not None:
            sizes = [audio_embeds.shape[0]]
        elif audio["input_features"] is not None:
            audio_embeds, sizes = self.get_audio_embeds(**audio)
        elif past:
            return inputs_embeds  # a placeholder that was sampled is a token like any other
        check_slots(slots.sum(1).tolist(), sizes)
        if audio_embeds is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(
            slots[..., None].to(inputs_embeds.device), audio_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        segment_clips: torch.Tensor | None = None,
        clip_order: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits over text and audio codes; with `labels` (-100 is ignored) the shifted mean cross entropy.

        `input_ids` (N, T) with one placeholder per audio slot; `attention_mask` (N, T) or (N, history + T); audio as
        `input_features` and its companions (see `get_audio_embeds`), or ready-made as `audio_embeds` (slots, D).
        `logits_to_keep` positions from the end, or a tensor of positions. Further keyword arguments reach the
        attention functions. Raises ValueError that names the row when slots and features do not match.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past and self.training and getattr(self.llm.model, "gradient_checkpointing", False):
            raise ValueError(
                "a key/value cache was given while gradient checkpointing is on in training mode: transformers would "
                "drop the cache silently. Call model.eval() or model.gradient_checkpointing_disable() first"
            )
        audio = {
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "segment_clips": segment_clips,
            "clip_order": clip_order,
        }
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self._embed(input_ids, past, audio_embeds, audio)
        elif input_features is not None or audio_embeds is not None:
            raise ValueError("inputs_embeds already hold the audio: give them without input_features or audio_embeds")
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,  # pyright: ignore
            past_key_values=past_key_values,
            labels=labels,  # pyright: ignore
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
