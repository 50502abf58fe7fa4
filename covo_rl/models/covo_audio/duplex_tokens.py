"""The ids of a model that listens while it speaks: three tokens that its tokenizer already has, and their rows.

No token is added: code 0 has the id after the tokenizer's last, so one more would shift all codes. The three ids before
it are those of the published vocabulary whose names are not known. A token that was trained would be lost, so they are
taken only where they plainly never were, or where the user names ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from covo_rl.data.terminal import say
from covo_rl.models.covo_audio.configuration import CONTROLS, LEFT_CHUNKS, duplex_section
from covo_rl.types import UserError

CHAT_START = "<|im_start|>"
UNUSED_NAME = re.compile(r"reserved|unused|dummy|placeholder", re.IGNORECASE)


def prepare_duplex(
    model: Any, tokenizer: Any, use_ids: Sequence[int] | None = None, *, silence_codes: Sequence[int] = (),
    left_chunks: int | None = LEFT_CHUNKS, mel_peak: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Give `model` its `duplex` section, and the rows of think, shift and break the mean of the text rows.

    `use_ids`: three ids to take in place of the default ones, whatever they were before. Says what the tokenizer
    calls them. A model that has the section keeps it, and its rows, which are trained. Returns the section.

    Raises UserError where the default ids are not plainly unused, where `use_ids` are not those that the model has, and
    where the section does not fit the model. Nothing is changed then.
    """
    config = model.config
    if config.duplex is not None:
        has = [config.duplex[name] for name in CONTROLS]
        if use_ids is not None and list(use_ids) != has:
            raise UserError(
                f"--use-ids {_listed(use_ids)}: the model has {_listed(has)} for {', '.join(CONTROLS)}, and they are "
                "trained. Leave the option out"
            )
        return config.duplex
    ids = (
        [config.audio_token_index - len(CONTROLS) + i for i in range(len(CONTROLS))]
        if use_ids is None
        else list(use_ids)
    )
    if len(ids) != len(CONTROLS):
        raise UserError(f"--use-ids {_listed(ids)}: give {len(CONTROLS)} ids, for {', '.join(CONTROLS)}")
    section = {
        **dict(zip(CONTROLS, ids, strict=True)), "silence_codes": list(silence_codes), "left_chunks": left_chunks,
        "mel_peak": mel_peak,
    }  # fmt: skip
    section = duplex_section(section, config)
    names = {i: tokenizer.convert_ids_to_tokens(i) for i in ids}
    if starts := [i for i, name in names.items() if name == CHAT_START]:
        raise UserError(f"--use-ids {_listed(ids)}: {starts[0]} is {CHAT_START!r}, with which every message begins")
    if use_ids is None and (used := _used_ids(model, names)):
        raise UserError(
            f"ids {_listed(used)} are {', '.join(repr(names[i]) for i in used)} in the tokenizer, and their rows look "
            f"trained: as {', '.join(CONTROLS)} what they mean would be lost. If they are free, or others are, write "
            f"--use-ids A,B,C, three ids below {config.audio_token_index}"
        )
    say(f"{', '.join(CONTROLS)} are the tokens {', '.join(f'{names[i]!r} ({i})' for i in ids)}")
    set_rows_to_text_mean(model, ids)
    config.duplex = section
    return section


def control_rows(config: Any) -> dict[str, list[int]]:
    """What PEFT's `trainable_token_indices` takes, so that LoRA trains these rows too and not around them; empty
    where `config` has no `duplex` section."""
    if config.duplex is None:
        return {}
    ids = [config.duplex[name] for name in CONTROLS]
    return {"embed_tokens": ids, "lm_head": ids}


@torch.no_grad()
def set_rows_to_text_mean(model: Any, ids: Sequence[int]) -> None:
    """In embeddings and head, rows `ids` become the mean of the text rows, those before audio code 0 but for `ids`.

    An untrained row can be of any size; this one is a text token of no meaning, and as likely as the average one.
    """
    text_rows, ids = model.config.audio_token_index, list(ids)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = part.weight
        total_D = weight[:text_rows].sum(0, dtype=torch.float64) - weight[ids].sum(0, dtype=torch.float64)
        weight[ids] = (total_D / (text_rows - len(ids))).to(weight.dtype)


def _used_ids(model: Any, names: dict[int, str | None]) -> list[int]:
    """Ids whose name does not say that they are free and whose embedding is neither 0 nor that of another of them."""
    rows = model.get_input_embeddings().weight.detach()[list(names)]
    untouched = [not row.any() or sum(torch.equal(row, other) for other in rows) > 1 for row in rows]
    free = [name is None or bool(UNUSED_NAME.search(name)) for name in names.values()]
    return [i for i, is_free, is_same in zip(names, free, untouched, strict=True) if not (is_free or is_same)]


def _listed(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))
