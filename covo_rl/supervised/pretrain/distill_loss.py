"""KL from a teacher's likeliest ids to the student, in chunks: logits of all positions never exist at once.

    top = top_logps(teacher_logits_MV, shared_ids_U, k=20)      per position K ids, their log-probs, that of the rest
    kl_M = chunked_kl(hidden_MD, head, top)                     differentiable in hidden states and head

The replies are the student's own (GKD, arXiv 2306.13649; on-policy distillation of Qwen3, arXiv 2505.09388), and the
divergence is the forward one, KL(teacher || student) of every position: its weights are the teacher's probabilities, so
that its largest terms are those of the ids that a top-k keeps. MiniLLM's reverse KL (arXiv 2306.08543) weighs by the
student's, which may lie wherever the top k has nothing.

Mass outside the top k is one further outcome, "another id" (`outside` "rest"): a KL over K + 1 outcomes, never above
the full one, equal to it where K is the vocabulary, 0 with gradient 0 where student and teacher agree. Among the other
ids the student is left as it is. `outside` "renormalise" scales the top k up to 1 and compares with the student's whole
softmax; it then pulls every tail to nothing, also of a student that equals its teacher (arXiv 2503.16870 measures what
that does to calibration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.head import chunk_elements, head_of
from covo_rl.policy.packing import pack
from covo_rl.policy.products import float32_logits
from covo_rl.policy.rows import PlainRows, packed_hidden

if TYPE_CHECKING:
    from covo_rl.policy import Policy
    from covo_rl.types import Group

Outside = Literal["rest", "renormalise"]


@dataclass(frozen=True)
class TopLogps:
    """What is kept of a teacher at M positions: `ids_MK` int64, `logps_MK` float32 in nats, likeliest first.

    `rest_M`: log-prob of all other ids together, None where there are none. With "renormalise" `renormalised` is True
    and the K sum to 1. `mass_M`: probability of the K before that.
    """

    ids_MK: torch.Tensor
    logps_MK: torch.Tensor
    rest_M: torch.Tensor | None
    mass_M: torch.Tensor
    renormalised: bool = False

    def to(self, device: torch.device) -> TopLogps:
        """The same on another device."""
        rest_M = None if self.rest_M is None else self.rest_M.to(device)
        ids_MK, logps_MK, mass_M = (x.to(device) for x in (self.ids_MK, self.logps_MK, self.mass_M))
        return TopLogps(ids_MK, logps_MK, rest_M, mass_M, self.renormalised)


def top_logps(
    logits_MV: torch.Tensor, shared_ids_U: torch.Tensor, k: int, *, outside: Outside = "rest", chunk: int | None = None
) -> TopLogps:
    """The K likeliest of the ids that both models have, of a teacher's logits in any precision.

    The teacher's softmax is over those ids: what it gives to others (padding rows, tokens of its own) is left out. K is
    `k`, or all of them where there are fewer. `chunk` positions are copied to float32 at a time.
    """
    rows = chunk or max(1, chunk_elements(logits_MV.device) // len(shared_ids_U))
    k = min(k, len(shared_ids_U))
    parts = [_top(part, shared_ids_U, k, outside) for part in logits_MV.split(rows)]
    rests = [part.rest_M for part in parts]
    return TopLogps(
        torch.cat([part.ids_MK for part in parts]),
        torch.cat([part.logps_MK for part in parts]),
        None if rests[0] is None else torch.cat(rests),  # type: ignore[arg-type]  # all or none
        torch.cat([part.mass_M for part in parts]),
        outside == "renormalise",
    )


def joined_logps(parts: Sequence[TopLogps]) -> TopLogps:
    """Positions of several, one after the other; all with the same K."""
    rests = [part.rest_M for part in parts if part.rest_M is not None]
    return TopLogps(
        torch.cat([part.ids_MK for part in parts]),
        torch.cat([part.logps_MK for part in parts]),
        torch.cat(rests) if rests else None,
        torch.cat([part.mass_M for part in parts]),
        parts[0].renormalised,
    )


def _top(logits_cV: torch.Tensor, shared_ids_U: torch.Tensor, k: int, outside: Outside) -> TopLogps:
    logps_cU = logits_cV.index_select(1, shared_ids_U).float().log_softmax(-1)
    top, places_cK = logps_cU.topk(k, -1)
    ids_cK = shared_ids_U[places_cK]
    if outside == "renormalise":
        return TopLogps(ids_cK, top.log_softmax(-1), None, top.exp().sum(-1), renormalised=True)
    rest_c = None if k == len(shared_ids_U) else logps_cU.scatter(1, places_cK, -torch.inf).logsumexp(-1)
    return TopLogps(ids_cK, top, rest_c, top.exp().sum(-1))


def chunked_kl(hidden_MD: torch.Tensor, head: Any, top: TopLogps, *, chunk: int | None = None) -> torch.Tensor:
    """KL(teacher || student) of every position in nats, (M,) float32; differentiable in hidden states and head.

    `head` makes (c, V) logits of hidden states; those of ids that both models do not have are to be `NEVER`
    (policy/head.py). A chunk's logits are made again in its backward.
    """
    width = max((getattr(m, "out_features", 0) for m in head.modules()), default=0)
    rows = chunk or max(16, chunk_elements(hidden_MD.device) // (width or 2**17))

    def one(hidden_cD: torch.Tensor, ids_cK: torch.Tensor, logps_cK: torch.Tensor, rest_c) -> torch.Tensor:
        return _kl(float32_logits(head, hidden_cD), ids_cK, logps_cK, rest_c)

    rests = [None] * -(-len(hidden_MD) // rows) if top.rest_M is None else top.rest_M.split(rows)
    parts = zip(hidden_MD.split(rows), top.ids_MK.split(rows), top.logps_MK.split(rows), rests, strict=True)
    return torch.cat([checkpoint(one, *part, use_reentrant=False) for part in parts])


def _kl(logits_cV: torch.Tensor, ids_cK: torch.Tensor, logps_cK: torch.Tensor, rest_c) -> torch.Tensor:
    """sum of q (log q - log p) over the K ids, and the rest where there is one."""
    whole_c1 = logits_cV.logsumexp(-1, keepdim=True)
    kl_c = (logps_cK.exp() * (logps_cK - (logits_cV.gather(1, ids_cK) - whole_c1))).sum(-1)
    if rest_c is None:
        return kl_c
    others_c = logits_cV.scatter(1, ids_cK, -torch.inf).logsumexp(-1) - whole_c1[:, 0]
    return kl_c + rest_c.exp() * (rest_c - others_c)


def dense_kl(
    student_logits_MV: torch.Tensor, teacher_logits_MV: torch.Tensor, shared_ids: Sequence[int], k: int, *,
    outside: Outside = "rest",
) -> torch.Tensor:  # fmt: skip
    """The slow reference of `chunked_kl`, position by position from whole softmaxes: (M,) in the student's precision.

    Both softmaxes are over the ids that both models have.
    """
    result = []
    for student_V, teacher_V in zip(student_logits_MV, teacher_logits_MV, strict=True):
        p_U = student_V[list(shared_ids)].softmax(-1)
        q_U = teacher_V[list(shared_ids)].to(p_U.dtype).softmax(-1)
        order = sorted(range(len(q_U)), key=lambda i: -float(q_U[i]))
        kept, others = order[:k], order[k:]
        q_K, p_K = q_U[kept], p_U[kept]
        if outside == "renormalise":
            q_K = q_K / q_K.sum()
        elif others:
            q_K, p_K = (torch.cat((x_K, x_U[others].sum()[None])) for x_K, x_U in ((q_K, q_U), (p_K, p_U)))
        result.append((q_K * (q_K.log() - p_K.log())).sum())
    return torch.stack(result)


def reply_kl(policy: Policy, groups: Sequence[Group], tops: Sequence[TopLogps]) -> torch.Tensor:
    """KL(teacher || student) of every id of these replies, (M,) float32; a function for `policy(reply_kl, ...)`."""
    family = policy.family
    packed = pack(groups, family.audio_token_id, policy.device)
    ids_L = packed.input_ids_L
    embeds_LD = family.embed_tokens(family.embeddable(ids_L))
    if family.packable:
        hidden_XD = packed_hidden(family, ids_L, embeds_LD, packed.position_ids_L, PackedLayout(packed))
        predictors_M = packed.predictors_M
    else:
        rows = PlainRows.of(packed)
        hidden_XD, predictors_M = rows.hidden(family, ids_L, embeds_LD), rows.predictors_M
    top = joined_logps(tops).to(hidden_XD.device)
    return chunked_kl(hidden_XD.index_select(0, predictors_M), head_of(family), top)
