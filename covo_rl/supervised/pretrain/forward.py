"""Packed rows through the model: log-probs of what is taught, each document by itself.

Documents share a row and must not see each other. `packed_logps` computes attention document by document, with the
layout that GRPO's packed rows have. `masked_hidden` leaves it to transformers, which finds the documents in the
positions and builds a mask of L x L; it is what the other way is compared with. It isolates only with
attention_mask=None and use_cache=False: with a cache, or a mask of ones, documents read those before them unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from covo_rl.models.base import ClipFeatures
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.policy import Policy
from covo_rl.policy.attention import NAME, PackedLayout
from covo_rl.policy.features import encoder_calls, silent_embeddings
from covo_rl.policy.head import head_of, token_logps
from covo_rl.policy.packable import attention_configs
from covo_rl.policy.packing import Packed, Span
from covo_rl.policy.rows import decoder_call, evaluation_mode, packed_hidden
from covo_rl.policy.sharding import most
from covo_rl.supervised.pretrain.stream_features import StreamFeatures
from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily
    from covo_rl.supervised.pretrain.packing import PackedBatch

#: attention functions of transformers that were compared with single documents
ISOLATING = (NAME, "sdpa", "eager")


class IsolationError(UserError, RuntimeError):
    """Documents that share a row would see each other."""


@dataclass(frozen=True)
class Taught:
    """Of a batch of N rows of L ids, seen as one run of N * L: M ids that are taught, and the places before them.

    targets, predictors, task: (M,) int64, task -1 where a document has none.
    """

    targets: Tensor
    predictors: Tensor
    task: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> Taught:
        """Raises ValueError where the first id of a document, which nothing predicts, is taught."""
        labels = batch.labels.flatten()
        places = torch.nonzero(labels != IGNORE)[:, 0]
        if bool((batch.position_ids.flatten()[places] == 0).any()):
            raise ValueError("a document's first id has a label: nothing stands before it")
        return cls(labels[places], places - 1, batch.task.flatten()[places].long())


def document_spans(position_ids_NL: Tensor) -> list[Span]:
    """Where the documents of a batch lie in its N * L positions, padding among them: each begins at position 0."""
    starts = torch.nonzero(position_ids_NL.flatten() == 0)[:, 0].tolist()
    return list(zip(starts, [*starts[1:], position_ids_NL.numel()], strict=True))


def documents_layout(position_ids_NL: Tensor, *, method: str | None = None) -> PackedLayout:
    """Attention of each document to itself: documents are prompts without completions. `method`: see PackedLayout."""
    none = torch.zeros(0, dtype=torch.int64, device=position_ids_NL.device)
    spans = tuple(document_spans(position_ids_NL))
    packed = Packed(
        prompts=(), prompt_spans=spans, row_spans=(), row_prompts=(), input_ids_L=position_ids_NL.flatten(),
        position_ids_L=position_ids_NL.flatten(), predictors_M=none, targets_M=none, mask_NC=none, places_M=none,
        audio_positions_S=none, audio_keys=(), prompt_positions=position_ids_NL.numel(),
    )  # fmt: skip
    return PackedLayout(packed, method=method)


def packed_logps(policy: Policy, batch: PackedBatch, taught: Taught, heard: StreamFeatures | None = None) -> Tensor:
    """Log-probs (M,) float32 of the taught ids. Call it as `wrapped(packed_logps, ...)`, under the wrapper's hooks.

    `heard` keeps what streams were heard as, from batch to batch.

    Raises:
        ValueError: the clips do not fill the slots.
    """
    family, device = policy.family, policy.device
    ids_NL, positions_NL = batch.input_ids.to(device), batch.position_ids.to(device)
    embeds_LD = packed_embeddings(policy, batch, heard).flatten(0, 1)
    layout = documents_layout(positions_NL)
    hidden_LD = packed_hidden(family, ids_NL.flatten(), embeds_LD, positions_NL.flatten(), layout)
    hidden_MD = hidden_LD.index_select(0, taught.predictors.to(device))
    return token_logps(hidden_MD, taught.targets.to(device), head_of(family))[0]


def masked_hidden(family: AudioFamily, batch: PackedBatch, embeds_NLD: Tensor) -> Tensor:
    """Hidden states (N, L, D) by transformers' own mask, the reference.

    Raises:
        IsolationError: the decoder's attention is none that was seen to isolate documents.
    """
    others = {config._attn_implementation for config in attention_configs(family.decoder)} - {*ISOLATING}
    if others:
        raise IsolationError(f"attention {', '.join(map(str, others))}: whether documents in a row stay apart was not "
                             f"shown for it; use {' or '.join(ISOLATING[1:])}")  # fmt: skip
    device = embeds_NLD.device
    return decoder_call(
        family, batch.input_ids.to(device), embeds_NLD, attention_mask=None, use_cache=False,
        position_ids=batch.position_ids.to(device),
    )  # fmt: skip


def packed_embeddings(policy: Policy, batch: PackedBatch, heard: StreamFeatures | None = None) -> Tensor:
    """(N, L, D): the rows' embeddings, their slots filled with the clips in order of appearance.

    Raises:
        ValueError: as many slots as features is a must.
    """
    family = policy.family
    ids_NL = batch.input_ids.to(policy.device)
    embeds_NLD = family.embed_tokens(family.embeddable(ids_NL))
    audio, dummy = encode_clips(policy, batch, heard)
    slots_NL = ids_NL == family.audio_token_id
    filled = int(slots_NL.sum())
    if filled != len(audio):
        raise ValueError(f"{filled} audio slots in the rows, and {len(audio)} features of {len(batch.clips)} clips")
    if filled:
        embeds_NLD = embeds_NLD.masked_scatter(slots_NL[..., None], audio.to(embeds_NLD.dtype))
    return embeds_NLD if dummy is None else embeds_NLD + 0.0 * dummy.sum().to(embeds_NLD.dtype)


def encode_clips(
    policy: Policy, batch: PackedBatch, heard: StreamFeatures | None = None
) -> tuple[Tensor, Tensor | None]:
    """Features (S, D) of the clips in order of appearance, and what keeps ranks in step, or None.

    Each is encoded once, streams by the streaming encoder.
    Ranks that share out the parameters make as many calls each; DDP waits for a gradient of the adapter on every rank.
    """
    family = policy.family
    clips = unique_clips(batch)
    calls = list(encoder_calls(family, clips, lambda clip: len(clip.tensors["input_features"])))
    count = len(calls) + len(batch.streams)
    if policy.sharded:
        dummies = most(count, policy.device) - count
    else:
        trained = not policy.embedder.frozen and torch.is_grad_enabled()
        dummies = int(not count and trained and torch.distributed.is_initialized())
    places = [place for place in range(len(batch.waves)) if place not in batch.streams]
    features = [features for call in calls for features in family.encode(call)]
    encoded = dict(zip(places if clips else [], features, strict=True))
    if batch.streams:
        waves = {key: batch.waves[place] for place, key in batch.streams.items()}
        encoded |= zip(batch.streams, (heard or StreamFeatures(policy)).of(waves), strict=True)
    width = family.embed_tokens.embedding_dim
    none = torch.zeros(0, width, device=policy.device)
    audio = torch.cat([none, *(encoded[place] for place in batch.clip_order.tolist() if encoded)])
    return audio, silent_embeddings(family, dummies) if dummies else None


def unique_clips(batch: PackedBatch) -> list[ClipFeatures]:
    """What the extractor made of each of the batch's unique clips, but for streams."""
    if not batch.audio:
        return []
    tensors = {name: batch.audio[name] for name in ("input_features", "input_features_mask")}
    of_clip = batch.audio["segment_clips"]
    clips = []
    for number in range(int(of_clip.max()) + 1):
        rows = of_clip == number
        own = {name: tensor[rows] for name, tensor in tensors.items()}
        clips.append(ClipFeatures(own, int(own["input_features_mask"].sum())))
    return clips


@torch.no_grad()
def check_isolation(policy: Policy, *, length: int = 9) -> float:
    """How far log-probs of a document move when the one before it in the row is replaced: 0.0, or it raises.

    Text of random ids, dropout off; on one process, before parameters are shared out.

    Raises:
        IsolationError: they move.
    """
    family = policy.family
    generator = torch.Generator().manual_seed(0)
    refused = {family.audio_token_id, *family.unsampled_ids}
    allowed = torch.tensor([i for i in range(family.embedded_ids) if i not in refused])

    def draw() -> Tensor:
        return allowed[torch.randint(len(allowed), (length,), generator=generator)]

    def logps(ids_L: Tensor) -> Tensor:
        ids_L, positions_L = ids_L.to(policy.device), torch.arange(length, device=policy.device).repeat(2)
        layout = documents_layout(positions_L[None])
        hidden_LD = packed_hidden(family, ids_L, family.embed_tokens(ids_L), positions_L, layout)
        return token_logps(hidden_LD[length:-1], ids_L[length + 1 :], head_of(family))[0]

    document = draw()
    with evaluation_mode(policy):
        one, other = (logps(torch.cat([draw(), document])) for _ in range(2))
    leak = float((one - other).abs().max())
    if leak > 1e-6:
        raise IsolationError(f"log-probs of a document move by {leak:.2g} nats with the document before it in its row")
    return leak
