"""One forward for all rollouts of a stream: the hazard of stopping at each of its decisions.

Until its first SHIFT every listening rollout is `U T U T ...`, until its first BREAK every speaking one is the same
reply. That path is the trunk; a rollout leaves it at one decision, so one forward over it holds the distribution of
all rollouts, and G of them cost what one costs.

    listening_trunk(prefix, chunks, ids)              prefix | U T | U T | ... | U
    speaking_trunk(prefix, begun, reply, ids)         prefix | U T | ... | U S | U w cccc | U _ cccc | ... | U
    stop_logits(family, trunks, features, ids)        z_K of each: log P(stop) - log P(go on), over the legal ids

U is the placeholder, its embedding replaced by the chunk's feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from covo_rl.duplex.grid import CHUNK_CODES
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.machine import Legal, legal_masks
from covo_rl.policy.rows import decoder_call

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


@dataclass(frozen=True)
class Trunk:
    """The path of a stream up to its last decision, which nothing follows.

    `ids` all of it; `places` of its chunks' U, one per feature; the last `decisions` of them are due, the K of the
    hazards. `listening` ones choose between SHIFT and THINK, others between BREAK and what goes on; `text_open` (K,)
    says of these whether text may still come.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    decisions: int
    listening: bool
    text_open: tuple[bool, ...] = ()

    @property
    def due(self) -> tuple[int, ...]:
        """Positions of the U whose decisions are due."""
        return self.places[len(self.places) - self.decisions :]

    @property
    def legal(self) -> list[Legal]:
        """What each decision is chosen from."""
        if self.listening:
            return [Legal.LISTENING] * self.decisions
        return [Legal.OPEN if is_open else Legal.CLOSED for is_open in self.text_open]


@dataclass(frozen=True)
class ReplyChunk:
    """What the model says in one chunk: an id of text, or None once the text is out, and four ids of codes."""

    text: int | None
    codes: tuple[int, ...]


def listening_trunk(prefix: Sequence[int], chunks: int, ids: DuplexIds) -> Trunk:
    """A model that has not spoken yet, over `chunks` chunks of the user; `prefix` as it stands before chunk 0."""
    path, places = _listened(prefix, chunks, ids)
    return Trunk(tuple(path[:-1]), tuple(places), chunks, True)


def speaking_trunk(prefix: Sequence[int], begun: int, reply: Sequence[ReplyChunk], ids: DuplexIds) -> Trunk:
    """A model that says SHIFT in chunk `begun` and then `reply`, one chunk of it per chunk of the user.

    Raises:
        ValueError: no reply, a chunk without four codes, or text after its end.
    """
    texts = [chunk.text is not None for chunk in reply]
    if not reply or any(len(chunk.codes) != CHUNK_CODES for chunk in reply):
        raise ValueError(f"a reply of {len(reply)} chunks with {sorted({len(c.codes) for c in reply})} codes: one or "
                         f"more chunks of {CHUNK_CODES} codes are spoken")  # fmt: skip
    if True in (late := texts[texts.index(False) :] if False in texts else []):
        raise ValueError(f"chunk {len(texts) - len(late) + late.index(True)} of a reply holds text after its end")
    path, places = _listened(prefix, begun + 1, ids)
    path[-1] = ids.shift
    for chunk in reply:
        places.append(len(path))
        path += [ids.placeholder, ids.text_pad if chunk.text is None else chunk.text, *chunk.codes]
    # text is closed by its first pad: the decision of that chunk was still open
    opened = (True, *texts[:-1])
    return Trunk(tuple(path[: places[-1] + 1]), tuple(places), len(reply), False, opened)


def _listened(prefix: Sequence[int], chunks: int, ids: DuplexIds) -> tuple[list[int], list[int]]:
    """Earlier turns in `prefix` have chunks too."""
    path = [*prefix, *[ids.placeholder, ids.think] * chunks]
    return path, [place for place, token in enumerate(path) if token == ids.placeholder]


def path_states(
    family: AudioFamily, paths: Sequence[Sequence[int]], places: Sequence[Sequence[int]],
    features: Sequence[torch.Tensor], cache: DynamicCache | None = None,
) -> torch.Tensor:  # fmt: skip
    """Hidden states (N, T, D) of paths of ids, right-padded; the features (chunks, D) of each stand at its `places`."""
    longest = max(map(len, paths))
    device = family.embed_tokens.weight.device
    ids_NT = torch.tensor([[*path, *[family.pad_token_id] * (longest - len(path))] for path in paths], device=device)
    # right-padded, and positions look back only: no mask is needed
    embeds_NTD = family.embed_tokens(family.embeddable(ids_NT))
    rows = torch.tensor([i for i, each in enumerate(places) for _ in each], device=device)
    columns = torch.tensor([place for each in places for place in each], device=device)
    heard_SD = torch.cat([feature.to(device, embeds_NTD.dtype) for feature in features])
    embeds_NTD = embeds_NTD.index_put((rows, columns), heard_SD)
    positions_NT = torch.arange(longest, device=device).expand(len(paths), -1)
    options: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
    return decoder_call(family, ids_NT, embeds_NTD, position_ids=positions_NT, **options)


def decision_states(
    family: AudioFamily, trunks: Sequence[Trunk], features: Sequence[torch.Tensor], cache: DynamicCache | None = None
) -> list[torch.Tensor]:
    """Hidden states (K, D) at the decisions of each trunk, in one padded forward; `features` (chunks, D) each.

    Raises:
        ValueError: a trunk with more or fewer features than chunks.
    """
    for i, (trunk, feature) in enumerate(zip(trunks, features, strict=True)):
        if len(feature) != len(trunk.places):
            raise ValueError(f"trunk {i} has {len(trunk.places)} chunks and {len(feature)} features: one per chunk")
    hidden_NTD = path_states(
        family, [trunk.ids for trunk in trunks], [trunk.places for trunk in trunks], features, cache
    )
    return [hidden_NTD[i, list(trunk.due)] for i, trunk in enumerate(trunks)]


def stop_logits(
    family: AudioFamily, trunks: Sequence[Trunk], features: Sequence[torch.Tensor], ids: DuplexIds
) -> list[torch.Tensor]:
    """z (K,) float32 of each trunk: the logit of stopping against all else that is legal; hazard = sigmoid(z)."""
    return hazard_logits(family, trunks, decision_states(family, trunks, features), ids)


def hazard_logits(
    family: AudioFamily, trunks: Sequence[Trunk], states: Sequence[torch.Tensor], ids: DuplexIds
) -> list[torch.Tensor]:
    """The same from hidden states (K, D) at the decisions.

    Only SHIFT and THINK, or BREAK, text_pad and text while it is open, count: what is not legal has no part in the
    softmax, as in sampling.
    """
    results = []
    for trunk, hidden_KD in zip(trunks, states, strict=True):
        logits_KV = family.lm_head(hidden_KD)
        masks = legal_masks(ids, logits_KV.shape[-1], logits_KV.device)
        results.append(masks.stop_logits(logits_KV, trunk.legal))
    return results
