"""What generation needs beyond transformers' `generate`: stop modes, a windowed penalty, audio for expanded rows.

`num_return_sequences` and beams repeat every row: the audio is encoded once before that, and the embeddings of a row
follow it, however many segments and clips the row has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from covo_rl.models.covo_audio.configuration import CovoAudioConfig
from covo_rl.models.slots import check_slots

AUDIO_FIELDS = ("input_features", "input_features_mask", "segment_clips", "clip_order", "audio_embeds")
STOP_MODES = {"a2ta": "turn_end_token_id", "a2t": "text_end_token_id"}


class WindowedRepetitionPenalty(LogitsProcessor):
    """Divides positive and multiplies negative scores of the ids among the last `window` ids of each row.

    `penalty` 1.0 changes nothing; `window` 0 means the whole sequence. An id counts once however often it occurs.
    Raises ValueError for a penalty that is not positive or a negative window.
    """

    def __init__(self, penalty: float, window: int = 8) -> None:
        if penalty <= 0 or window < 0:
            raise ValueError(f"penalty={penalty}, window={window}: the penalty must be positive, the window 0 or more")
        self.penalty = penalty
        self.window = window

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        """ids (N, T), scores (N, V) -> new scores (N, V)."""
        recent = input_ids[:, -self.window :] if self.window else input_ids
        picked = scores.gather(1, recent)
        # Duplicates write the same value, so the order of the scatter does not matter.
        return scores.scatter(1, recent, torch.where(picked < 0, picked * self.penalty, picked / self.penalty))


class CovoAudioGenerationMixin(GenerationMixin):
    """Methods of the model around `GenerationMixin.generate`."""

    config: CovoAudioConfig
    get_audio_features: Callable[..., Any]

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        stop_mode: str | None = None,
        window_penalty: float | None = None,
        window_size: int = 8,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` with three more options.

        `stop_mode`: "a2ta" (default) ends at the turn's end token, "a2t" at the end-of-text token; it is ignored
        where `eos_token_id` or a `generation_config` is given. `window_penalty` (published: 1.05) over the last
        `window_size` ids runs after `repetition_penalty` and before temperature, top-k and top-p.
        Raises ValueError for an unknown stop mode.
        """
        if stop_mode is not None and stop_mode not in STOP_MODES:
            raise ValueError(f"stop_mode={stop_mode!r} does not exist; write one of {', '.join(STOP_MODES)}")
        if stop_mode is not None or (kwargs.get("generation_config") is None and kwargs.get("eos_token_id") is None):
            kwargs.setdefault("eos_token_id", getattr(self.config, STOP_MODES[stop_mode or "a2ta"]))
        if kwargs.get("generation_config") is None and self.generation_config.pad_token_id is None:
            kwargs.setdefault("pad_token_id", self.config.text_end_token_id)
        processors = LogitsProcessorList(logits_processor or [])
        if window_penalty is not None and window_penalty != 1.0:
            processors.insert(0, WindowedRepetitionPenalty(window_penalty, window_size))
        return super().generate(inputs, logits_processor=processors, **kwargs)  # pyright: ignore

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        audio = {name: model_kwargs.pop(name) for name in AUDIO_FIELDS if model_kwargs.get(name) is not None}
        if expand_size > 1 and input_ids is not None and audio:
            slots = (input_ids == self.config.audio_placeholder_token_id).sum(1).tolist()
            embeds = audio.get("audio_embeds")
            if embeds is None:
                features = self.get_audio_features(**audio)
                embeds = features.pooler_output
                check_slots(slots, features.sizes)
            audio = {"audio_embeds": torch.cat([row for row in embeds.split(slots) for _ in range(expand_size)])}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # pyright: ignore
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **audio}

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs: Any) -> dict[str, Any]:
        """Audio only where its placeholders are among the ids: in the first pass, or always without a cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            for name in AUDIO_FIELDS:
                inputs.pop(name, None)
        return inputs
