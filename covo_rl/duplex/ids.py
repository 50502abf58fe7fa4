"""The ids that a full-duplex dialogue is written in, and what each is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from covo_rl.models.covo_audio.configuration import duplex_section
from covo_rl.types import UserError

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


class DuplexIdsError(UserError, ValueError):
    """Ids that do not fit the model, or each other."""


class TokenKind(Enum):
    """What an id is; the value stands in messages."""

    USER = "the user's chunk"
    THINK = "THINK"
    SHIFT = "SHIFT"
    BREAK = "BREAK"
    TEXT = "text"
    TEXT_PAD = "text_pad"
    CODE = "an audio code"
    OTHER = "an id without a place here"


@dataclass(frozen=True)
class DuplexIds:
    """All ids of a full-duplex dialogue.

    `think`, `shift` and `break_` are the decisions, `text_pad` stands where a reply's text is over and its codes are
    not; `placeholder` is the user's chunk, whose embedding a feature replaces; `audio_bos` and `audio_eos` are around
    all chunks. Audio code c is the id `first_code + c`. `silence_codes` are codes (0 is the first) that sound like
    silence, taken in turn where a reply lacks codes. `marks` are further ids that are no text: ChatML's.

    Raises DuplexIdsError with all that is wrong: ids that two meanings share, that are audio codes, or are none.
    """

    think: int
    shift: int
    break_: int
    text_pad: int
    placeholder: int
    audio_bos: int
    audio_eos: int
    first_code: int
    num_codes: int
    silence_codes: tuple[int, ...] = ()
    marks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = ("think", "shift", "break_", "text_pad", "placeholder", "audio_bos", "audio_eos")
        meanings: dict[int, list[str]] = {}
        for name in names:
            meanings.setdefault(getattr(self, name), []).append(name)
        problems = [f"{' and '.join(same)} are one id, {i}" for i, same in meanings.items() if len(same) > 1]
        problems += [
            f"{', '.join(same)}: id {i} is not below {self.first_code}, the id of audio code 0"
            for i, same in meanings.items() if not 0 <= i < self.first_code
        ]  # fmt: skip
        if self.num_codes < 1:
            problems.append("the model has no audio codes: it cannot speak")
        if wrong := [code for code in self.silence_codes if not 0 <= code < self.num_codes]:
            problems.append(f"silence_codes: {wrong[0]} is no code; there are 0 to {self.num_codes - 1}")
        if problems:
            raise DuplexIdsError("ids of full duplex: " + "; ".join(problems))

    @classmethod
    def of(cls, family: Any) -> DuplexIds:
        """Those of a loaded Covo-Audio whose configuration has a `duplex` section.

        Raises:
            DuplexIdsError: it has none, or ids do not fit each other.
            DuplexSectionError: it does not fit the model.
        """
        config, known = family.model.config, family.tokenizer.get_vocab()
        if getattr(config, "duplex", None) is None:
            raise DuplexIdsError(
                "the model was not made to listen while it speaks: its config.json has no section duplex, which says "
                "the ids of think, shift and break; `covo-rl duplex prepare` makes a copy that has one, to be trained"
            )
        section = duplex_section(config.duplex, config)
        return cls(
            think=section["think"], shift=section["shift"], break_=section["break"], text_pad=section["text_pad"],
            placeholder=config.audio_placeholder_token_id, audio_bos=config.audio_bos_token_id,
            audio_eos=config.audio_eos_token_id, first_code=config.audio_token_index,
            num_codes=config.num_audio_codes, silence_codes=tuple(section["silence_codes"]),
            marks=tuple(known[name] for name in CHATML if name in known),
        )  # fmt: skip

    def kind(self, token: int) -> TokenKind:
        """What this id is."""
        if token >= self.first_code:
            return TokenKind.CODE if token < self.first_code + self.num_codes else TokenKind.OTHER
        named = self._named.get(token)
        if named is not None:
            return named
        return TokenKind.TEXT if token >= 0 else TokenKind.OTHER

    @cached_property
    def _named(self) -> dict[int, TokenKind]:
        return dict.fromkeys((*self.marks, self.audio_bos, self.audio_eos), TokenKind.OTHER) | {
            self.think: TokenKind.THINK, self.shift: TokenKind.SHIFT, self.break_: TokenKind.BREAK,
            self.text_pad: TokenKind.TEXT_PAD, self.placeholder: TokenKind.USER,
        }  # fmt: skip

    def silence(self, start: int, count: int) -> tuple[int, ...]:
        """`count` codes of silence from the `start`-th code of a reply on.

        Raises:
            DuplexIdsError: the model says no code that is silence.
        """
        if count and not self.silence_codes:
            raise DuplexIdsError(
                f"{count} codes of silence are needed to fill up a reply's last chunk, and the model says none: name "
                "some as silence_codes in the section duplex of its config.json"
            )
        return tuple(self.silence_codes[i % len(self.silence_codes)] for i in range(start, start + count))
