"""The teacher of distillation: any causal language model of transformers, or a family of this project, frozen.

Its vocabulary must be that of the student's text. `shared_ids` are the ids that are the same token in both: nothing
else is drawn, and nothing else is a target.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.data.read import printable, some
from covo_rl.models import ModelError, damage_named, load_family, model_config
from covo_rl.models.base import AudioFamily
from covo_rl.models.builtin import resolve_model
from covo_rl.models.weights import load_whole
from covo_rl.policy.products import float32_head, float32_logits
from covo_rl.policy.rows import decoder_call
from covo_rl.prompt import position_limit
from covo_rl.types import UserError

if TYPE_CHECKING:
    from torch import nn

#: whose ids two tokenizers with the same vocabulary, but other merges or pre-tokenization, write otherwise
PROBE = "The 12 bells don't ring  twice.\n\tÄrger, naïve: 你好,世界! こんにちは 🙂 x_1 = 3.50e-7;"


class DistillError(UserError, ValueError):
    """A teacher that cannot teach this student, or that gave no numbers."""


class Teacher:
    """Logits of a frozen model for ids of its own vocabulary. `limit`: positions it takes, None where unknown."""

    def __init__(self, path: str, *, dtype: str = "auto", device: torch.device | str = "cpu") -> None:
        """Load it from a folder, a hub name or `builtin:NAME`.

        Raises:
            ModelError, WeightsError, OSError: it does not load.
        """
        self.path, folder = path, resolve_model(path)
        self.family: AudioFamily | None = load_family(folder, dtype=dtype) if _has_family(folder) else None
        self.model: Any = _language_model(folder, dtype) if self.family is None else self.family.model
        self.tokenizer: Any = _tokenizer(folder) if self.family is None else self.family.tokenizer
        self.model.requires_grad_(False).eval().to(device)
        self.limit = position_limit(self.model.config)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def rows(self) -> int:
        """How many ids it has logits of."""
        head: nn.Module = self.model.get_output_embeddings() if self.family is None else self.family.lm_head
        widths = [getattr(module, "out_features", 0) for module in head.modules()]
        return max(widths, default=0) or self.model.config.get_text_config().vocab_size

    @torch.no_grad()
    def logits(self, ids: Sequence[int], count: int) -> torch.Tensor:
        """(count, V): what it says of the last `count` of these ids, each from those before it.

        A row at a time, by the model's own forward: whatever its layers are made of, nothing is padded, and what it
        does to logits (scales, caps) is done.
        """
        device = next(self.model.parameters()).device
        ids_1T = torch.tensor([ids[:-1]], device=device)
        with torch.autocast(device.type, enabled=False):
            if self.family is not None:
                return self._family_logits(self.family, ids_1T, count)
            more = {"logits_to_keep": count} if self._keeps else {}
            head = self.model.get_output_embeddings()
            with nullcontext() if head is None else float32_head(head):
                return self.model(input_ids=ids_1T, use_cache=False, **more).logits[0, -count:]

    @staticmethod
    def _family_logits(family: AudioFamily, ids_1T: torch.Tensor, count: int) -> torch.Tensor:
        embeds_1TD = family.embed_tokens(family.embeddable(ids_1T))
        positions_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
        hidden_1TD = decoder_call(family, ids_1T, embeds_1TD, position_ids=positions_1T, use_cache=False)
        return float32_logits(family.lm_head, hidden_1TD[0, -count:])


def _has_family(folder: str) -> bool:
    try:
        model_config(folder)
    except ModelError:
        return False
    return True


def _language_model(folder: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    with damage_named(folder):
        return load_whole(AutoModelForCausalLM, folder, dtype=dtype)


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    with damage_named(folder):
        return AutoTokenizer.from_pretrained(folder)


def shared_ids(student: AudioFamily, teacher: Teacher) -> list[int]:
    """Ids that are the same token of text for both, in order.

    The teacher may have rows beyond its tokenizer, or none of the student's audio tokens and codes; an added token of
    one that is none of the other, or stands at an id where the other has another one, is not shared.

    Raises:
        DistillError: the tokenizers differ otherwise: which tokens, at which ids.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    added = {i for made in (student.tokenizer, teacher.tokenizer) for i in getattr(made, "added_tokens_decoder", {})}
    problems = _differences(ours, theirs, added)
    if not problems:
        ids = [made(PROBE, add_special_tokens=False)["input_ids"] for made in (student.tokenizer, teacher.tokenizer)]
        if ids[0] != ids[1]:
            problems = [f"they write the same text in other ids ({printable(ids[0])} and {printable(ids[1])})"]
    if problems:
        raise DistillError(
            f"teacher {teacher.path}: its tokenizer is not the student's: {'; '.join(problems)}. Distillation compares "
            "probabilities id by id: give a teacher with the student's vocabulary of text"
        )
    never = {student.audio_token_id, *student.code_ids, *student.unsampled_ids}
    if teacher.family is not None:
        never |= {teacher.family.audio_token_id, *teacher.family.code_ids}
    most = min(student.embedded_ids, teacher.rows)
    shared = sorted(i for token, i in ours.items() if theirs.get(token) == i and i < most and i not in never)
    if not set(shared).intersection(student.eos_token_ids):
        ends = student.tokenizer.convert_ids_to_tokens(list(student.eos_token_ids))
        raise DistillError(f"teacher {teacher.path} has none of the tokens that end a reply ({some(ends)})")
    return shared


def _differences(ours: dict[str, int], theirs: dict[str, int], added: set[int]) -> list[str]:
    """What keeps ids from being comparable; tokens beside the added ones must be the same."""
    moved = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    only = [
        sorted(token for token, i in one.items() if token not in other and i not in added)
        for one, other in ((ours, theirs), (theirs, ours))
    ]
    listed = [f"{printable(token)} is {ours[token]} here and {theirs[token]} there" for token in moved[:3]]
    return [
        *([f"{len(moved)} tokens have other ids ({', '.join(listed)})"] if moved else []),
        *(
            f"{len(names)} tokens are the {whose} alone ({', '.join(map(printable, names[:3]))})"
            for names, whose in zip(only, ("student's", "teacher's"), strict=True)
            if names
        ),
    ]
