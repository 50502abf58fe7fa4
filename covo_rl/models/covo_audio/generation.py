"""Answers of Covo-Audio: transformers' `generate` with the published penalty, stop modes and patterns of speech."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from covo_rl.models.covo_audio.pattern import TEXT_ALONE, SpeechPattern, parse_pattern
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
    """What `generate` of a Covo-Audio model does beside transformers' own."""

    config: Any
    generation_config: Any
    get_audio_features: Any

    def generate(
        self, inputs: torch.Tensor | None = None, *, stop_mode: str | None = None, pattern: str | None = None,
        window_penalty: float | None = None, window_size: int = 8, logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """transformers' `generate` with four more options.

        `stop_mode`: "a2ta" (default) ends at the turn's end token, "a2t" at the end-of-text token; it is ignored
        where `eos_token_id` or a `generation_config` is given. `pattern` (published: none) holds answers to blocks of
        text and codes, "5:15", or to text alone, "a2t", which either end token ends; stop_mode "a2t" turns speech off
        too. `window_penalty` (published: 1.05) over the last `window_size` ids runs after `repetition_penalty`; both
        and the pattern before temperature, top-k and top-p.
        Raises ValueError for a stop mode or a pattern that does not exist.
        """
        if stop_mode is not None and stop_mode not in STOP_MODES:
            raise ValueError(f"stop_mode={stop_mode!r} does not exist; write one of {', '.join(STOP_MODES)}")
        if stop_mode is not None or (kwargs.get("generation_config") is None and kwargs.get("eos_token_id") is None):
            modes = STOP_MODES if stop_mode is None and pattern == TEXT_ALONE else [stop_mode or "a2ta"]
            kwargs.setdefault("eos_token_id", [getattr(self.config, STOP_MODES[mode]) for mode in modes])
        if kwargs.get("generation_config") is None and self.generation_config.pad_token_id is None:
            kwargs.setdefault("pad_token_id", self.config.text_end_token_id)
        processors = LogitsProcessorList(logits_processor or [])
        if window_penalty is not None and window_penalty != 1.0:
            processors.insert(0, WindowedRepetitionPenalty(window_penalty, window_size))
        if pattern is not None:
            processors.append(self._speech_pattern(pattern, stop_mode == TEXT_ALONE, inputs, kwargs))
        return super().generate(inputs, logits_processor=processors, **kwargs)  # pyright: ignore

    def _speech_pattern(
        self, pattern: str, silent: bool, inputs: torch.Tensor | None, options: dict[str, Any]
    ) -> SpeechPattern:
        ids = options.get("input_ids") if inputs is None else inputs
        end_ids = options.get("eos_token_id")
        if end_ids is None:
            end_ids = (options.get("generation_config") or self.generation_config).eos_token_id
        end_ids = [end_ids] if isinstance(end_ids, int) else list(end_ids or [])
        first, count = self.config.audio_token_index, self.config.num_audio_codes
        parse_pattern(pattern)  # a wrong one is said, though nothing is spoken
        return SpeechPattern(
            TEXT_ALONE if silent else pattern, first, count, end_ids, 0 if ids is None else ids.shape[1]
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """The audio is encoded once, before `num_return_sequences` and beams repeat rows with their embeddings."""
        audio = {name: model_kwargs.pop(name) for name in AUDIO_FIELDS if model_kwargs.get(name) is not None}
        if expand_size > 1 and input_ids is not None and audio:
            slots = (input_ids == self.config.audio_placeholder_token_id).sum(1).tolist()
            embeds = audio.get("audio_embeds")
            if embeds is None:
                features: Any = self.get_audio_features(**audio)
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
