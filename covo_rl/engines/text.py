"""Completion ids -> text: what rewards, evaluation and the logs read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class TextDecoder:
    """Completion ids -> text: special tokens, end and padding dropped, the four tags kept even if they are special.

    Ids beyond the tokenizer (audio codes) have no text and are dropped too.
    """

    def __init__(self, family: AudioFamily) -> None:
        self.tokenizer: Any = family.tokenizer
        tags = set(self.tokenizer.convert_tokens_to_ids(list(TAGS)))
        special = {*self.tokenizer.all_special_ids, *_added_special(self.tokenizer)}
        self.dropped = ({*special, family.audio_token_id} - tags) | {*family.eos_token_ids, family.pad_token_id}
        self.size = len(self.tokenizer)

    def __call__(self, ids: Sequence[int]) -> str:
        kept = [i for i in ids if i not in self.dropped and i < self.size]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _added_special(tokenizer: Any) -> set[int]:
    """Added tokens marked special that the tokenizer does not list among its special ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {int(i) for i, token in added.items() if getattr(token, "special", False)}
