"""Which ids may follow while a reply is generated: blocks of text ids and audio codes, or no codes at all.

    model.generate(**inputs, pattern="5:15")     five text ids, fifteen codes, five text ids ... then codes to the end
    model.generate(**inputs, pattern="a2t")      text alone

The published model learned 5:15 and is not held to it; small or freshly trained ones leave it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

TEXT_ALONE = "a2t"


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Ids of text and codes in a block, "5:15" -> (5, 15); None for "a2t", where nothing is spoken.

    Raises:
        ValueError: anything else.
    """
    if pattern == TEXT_ALONE:
        return None
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", str(pattern))
    if match is None:
        raise ValueError(
            f"pattern={pattern!r:.40} does not exist; write TEXT:CODES, the ids of each in a block, such as 5:15, or "
            f"{TEXT_ALONE} (no speech)"
        )
    return int(match[1]), int(match[2])


class SpeechPattern(LogitsProcessor):
    """Leaves those ids that the pattern allows next; the scores of the others become -inf.

    With blocks of 5:15, after ids that kept to them:
      in a text block    text and codes; a code says that the text is over
      in a code block    codes
      text over          codes
    and an end id wherever the id before it is a code: an answer neither begins with its end nor leaves text unspoken.

    The place in the pattern is read off a row's ids, and kept nowhere: rows do not depend on each other, and beams may
    be reordered. The `num_codes` ids from `first_code_id` on are codes; the answer begins at `prompt_length`.
    """

    def __init__(
        self, pattern: str, first_code_id: int, num_codes: int, end_ids: Sequence[int], prompt_length: int = 0
    ) -> None:
        self.block = parse_pattern(pattern)
        if num_codes < 1 and self.block is not None:
            raise ValueError(f"pattern={pattern!r}: this model has no audio codes; write {TEXT_ALONE} or leave it out")
        self.codes = slice(first_code_id, first_code_id + num_codes)
        self.end_ids = [i for i in dict.fromkeys(end_ids) if 0 <= i < first_code_id]
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        """ids (N, T), scores (N, V) -> new scores (N, V)."""
        if self.block is None:
            allowed = torch.ones_like(scores, dtype=torch.bool)
            allowed[:, self.codes] = False
            return scores.masked_fill(~allowed, -torch.inf)
        text, codes = self.block
        answer_NA = input_ids[:, self.prompt_length :]
        is_code_NA = (answer_NA >= self.codes.start) & (answer_NA < self.codes.stop)
        place_A = torch.arange(answer_NA.shape[1], device=answer_NA.device) % (text + codes)
        over_N = (is_code_NA != (place_A >= text)).any(1)
        in_text = answer_NA.shape[1] % (text + codes) < text
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, : self.codes.start] = (~over_N & in_text)[:, None]
        allowed[:, self.codes] = True
        after_code_N = is_code_NA[:, -1] if answer_NA.shape[1] else torch.zeros_like(over_N)
        for i in self.end_ids:  # not by a list of them, which would be copied to the device at every step
            allowed[:, i] = after_code_N
        return scores.masked_fill(~allowed, -torch.inf)
