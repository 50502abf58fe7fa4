"""What a family of audio language models must say, and no more. The rest of covo_rl is shared.

A family wraps one loaded model and its processor. The policy, the sampler, evaluation and export talk to
this interface only. PEFT injects its layers in place, so `decoder`, `lm_head` and `encode` keep working on
a model that carries an adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from covo_rl.models.slots import expand_placeholders
from covo_rl.models.text import shielded_messages, token_ids
from covo_rl.models.weights import load_whole
from covo_rl.prompt import CUT

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

#: in front of a chat template: instead of today's date an error, whose text tells what to do
NO_DATE = """{%- macro strftime_now(format) -%}{{ raise_exception(
    "it would write today's date (" ~ format ~ "), and the same row be another prompt tomorrow: give a system message "
    "of your own (--system_prompt), with the date of your choice in it, or a model folder whose chat_template.jinja "
    "has a fixed one") }}{%- endmacro -%}"""


@dataclass(frozen=True)
class ClipFeatures:
    """What the processor makes of one clip, on the CPU.

    `tensors`: name -> tensor whose first axis is the clip's rows (a clip over one segment has several);
    for example `input_features` (rows, M, F) float32. `slots`: audio positions S that the clip fills.
    """

    tensors: Mapping[str, torch.Tensor]
    slots: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def part_kinds(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """The type of every part of the contents that are lists, in order."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [str(part.get("type")) for content in contents for part in content]


class AudioFamily(ABC):
    """One loaded audio language model: encoder -> adapter -> decoder -> head.

    A family states its names and how a clip is heard; text, ids, decoder and head have defaults that fit the models
    of transformers.
    """

    model_type: ClassVar[str]
    #: the classes of model and processor, each with `from_pretrained`.
    model_class: ClassVar[Any]
    processor_class: ClassVar[Any]
    #: part name -> prefix of its parameters in `model`: encoder, audio_adapter, llm, lm_head.
    parts: ClassVar[Mapping[str, str]]
    #: last names of the decoder's Linears that LoRA adapts by default; None: every Linear inside its layers.
    lora_leaves: ClassVar[tuple[str, ...] | None] = None
    #: longest clip in seconds the family takes, or None where it has no limit.
    max_clip_seconds: float | None = None
    #: replaces the processor's own template, or None.
    chat_template: ClassVar[str | None] = None
    #: False where a packed row would leak from one completion into another (Mamba, linear attention, convolutions).
    packable: ClassVar[bool] = True
    #: rows of several clips may share a call of the encoder: all padded to one length, and masked.
    rows_independent: ClassVar[bool] = False
    #: folder of the checkpoint in which it ships a LoRA of its own, which is merged on loading (models/weights.py).
    adapter_folder: ClassVar[str] = ""
    #: False: replies hold no audio codes, where the family has any.
    speaks: bool = True
    #: the class of vLLM that takes adapters, where it is not the one that the checkpoint names.
    vllm_architecture: ClassVar[str] = ""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @classmethod
    def load(
        cls, path: str, *, dtype: str = "auto", attn_implementation: str | None = None, trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:  # fmt: skip
        """Load model and processor from a local folder or a hub name; further arguments go to the model.

        Raises WeightsError (an OSError) where tensors are missing, of another shape, or not finite.
        `trust_remote_code` is for families whose code ships with the checkpoint; those of covo_rl and transformers
        need none and ignore it.
        """
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        model = load_whole(cls.model_class, path, dtype=dtype, **kwargs)
        return cls(model, cls.processor_class.from_pretrained(path))

    # -- what it hears -------------------------------------------------------------------------------------------

    @abstractmethod
    def clip_features(self, waveform: np.ndarray, sampling_rate: int) -> ClipFeatures:
        """Mono float32 waveform at any rate -> features of this one clip, independent of any batch."""

    def clip_slots(self, waveform: np.ndarray, sampling_rate: int) -> int:
        """`clip_features(...).slots`; a family that can count them without the features says how."""
        return self.clip_features(waveform, sampling_rate).slots

    @abstractmethod
    def encode(self, clips: Sequence[ClipFeatures]) -> list[torch.Tensor]:
        """One (S_i, D) embedding per clip, the same alone and beside others; gradients where parts train."""

    # -- text and ids --------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def audio_token_id(self) -> int:
        """The id whose embedding is replaced by an audio feature, one per slot."""
        return self.model.config.audio_token_id

    @property
    @abstractmethod
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion."""

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Chat template -> text with ONE audio token per clip; special tokens that the messages spell hold a CUT.

        Raises:
            ValueError: a part of a message is neither text nor audio; the template cannot take the conversation, would
                write today's date, or writes more or fewer audio tokens than there are clips.
        """
        template, rows = self.chat_template or self.processor.chat_template, self.template_messages(messages)
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            if "strftime_now" in (template or ""):
                template = NO_DATE + template
            text = self.tokenizer.apply_chat_template(rows, chat_template=template, **options)
        except Exception as error:  # a template is code of the checkpoint
            raise ValueError(f"the chat template cannot take this conversation: {error}") from error
        token = self.processor.audio_token
        clips, tokens = part_kinds(messages).count("audio"), text.count(token)
        if tokens != clips:
            hint = "; it has place for one in a message" if 0 < tokens < clips else ""
            raise ValueError(f"the chat template writes {tokens} audio tokens ({token}) for {clips} clips{hint}")
        return text

    def template_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the chat template gets: a copy whose texts hold a CUT in the special tokens that they spell."""
        if others := {*part_kinds(messages)} - {"text", "audio"}:
            raise ValueError(f"a message holds {', '.join(sorted(others))}; only text and audio can be taken here")
        return shielded_messages(messages, self.tokenizer)

    def tokenize(self, text: str, slots: Sequence[int]) -> list[int]:
        """Text with one audio token per clip -> ids with `slots[i]` audio ids for clip i; what CUT parts stays text."""
        return token_ids(self.tokenizer, expand_placeholders(text.split(CUT), slots, self.processor.audio_token))

    def unexpanded_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation's ids with ONE audio id per clip, as servers want them: they expand it, frame and all."""
        text = self.render(messages)
        return AudioFamily.tokenize(self, text, [1] * text.count(self.processor.audio_token))

    # -- the language model --------------------------------------------------------------------------------------

    @property
    def unsampled_ids(self) -> tuple[int, ...]:
        """Ids that are never drawn, and masked in scoring alike: the decoder would embed them otherwise than we do."""
        return ()

    @property
    def code_ids(self) -> range:
        """Ids of the audio codes that a reply can hold, the first is code 0; empty where a family writes text alone."""
        return range(0)

    @property
    def trained_rows(self) -> Mapping[str, list[int]]:
        """Module of embeddings or head (how its name ends) -> ids whose rows train beside LoRA."""
        return {}

    def embeddable(self, ids_L: torch.Tensor) -> torch.Tensor:
        """The ids with a pad in place of an audio id that `embed_tokens` has no row for; slots are filled after it.

        An audio id that has a row stays: a model that draws it is told so by that row, as in its own `generate`.
        """
        if self.audio_token_id < self.embedded_ids:
            return ids_L
        return ids_L.masked_fill(ids_L == self.audio_token_id, self.pad_token_id)

    @property
    def embedded_ids(self) -> int:
        """How many ids `embed_tokens` has a row for, also under an adapter, and where ZeRO-3 shares the rows out."""
        weight = self.embed_tokens.weight
        return getattr(weight, "ds_shape", weight.shape)[0]

    def decoder_inputs(self, ids_L: torch.Tensor, embeds_LD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further keyword arguments of the decoder, (L, ...) each, from packed ids and filled embeddings."""
        return {}

    @property
    def embed_tokens(self) -> nn.Embedding:
        return cast("nn.Embedding", self.model.get_input_embeddings())

    @property
    def decoder(self) -> nn.Module:
        """Takes inputs_embeds, attention_mask, position_ids, past_key_values; returns last_hidden_state."""
        return self.model.get_decoder()

    @property
    def stock_logits_divisor(self) -> float:
        """What the logits of the model's own class, as others load it, are to be divided by; 1 where it is right."""
        return 1.0

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states (..., D) -> logits (..., V): a Linear, or a module around one that scales or caps."""
        return self.model.get_output_embeddings()
