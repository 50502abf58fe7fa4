"""Attention over segments of a packed row, with its log-sum-exp: the one place that calls a CUDA attention kernel.

    out, lse = varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=True, scale=0.125)
    dq, dk, dv = varlen_backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal=True, scale=0.125)

Segment i has the queries `cu_q[i]:cu_q[i + 1]` and the keys `cu_k[i]:cu_k[i + 1]`, or, with `used_k`, the `used_k[i]`
keys from `cu_k[i]` on, in any order and with gaps. `causal`: query j of a segment, which has as many keys as queries,
sees its keys 0 to j. The backward takes any `out` and `lse`: with those of a softmax over more keys than these it gives
the exact gradient of this part.

    q, out (Lq, H, d); k, v (Lk, K, d), K divides H; lse (H, Lq) float32; cu_q, cu_k (B + 1,), used_k (B,) int32

A segment with queries has a key. The kernel is trusted only after `available` has compared it with the plain form.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from covo_rl.policy.products import HALF

Tensors = tuple[torch.Tensor, ...]

#: of the self-check: largest error of a row over its own size plus that of rows on average, and of a log-sum-exp
ROW_TOLERANCE, LSE_TOLERANCE = 0.03, 1e-3


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    *, causal: bool, scale: float, used_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse); no gradient. `max_q` and `max_k` are at least the longest segment's queries and keys."""
    if available(q.device, q.dtype, q.shape[-1]):
        return _kernel(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, used_k)
    with torch.autocast(q.device.type, enabled=False):  # it would make 16-bit products
        return _plain(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, used_k)


def varlen_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int, *, causal: bool, scale: float,
) -> Tensors:  # fmt: skip
    """(dq, dk, dv); rows of q, k and v outside all segments have no defined gradient."""
    if available(q.device, q.dtype, q.shape[-1]):
        return _kernel_backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale)
    with torch.autocast(q.device.type, enabled=False):
        return _plain_backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale)


# -- the kernel ------------------------------------------------------------------------------------------------------


def _kernel(q, k, v, cu_q, cu_k, max_q: int, max_k: int, causal: bool, scale: float, used_k=None) -> Any:
    # arguments of torch 2.11 and later; where no segment has two queries the kernel counts on one in each
    max_q = max_q if len(q) == len(cu_q) - 1 else max(max_q, 2)
    used = {} if used_k is None else {"seqused_k": used_k}
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale, **used
    )[:2]


def _kernel_backward(
    grad_out, q, k, v, out, lse, cu_q, cu_k, max_q: int, max_k: int, causal: bool, scale: float
) -> Any:
    random = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # of dropout: none
    return torch.ops.aten._flash_attention_backward(
        grad_out.contiguous(), q, k, v, out, lse.contiguous(), cu_q, cu_k, max_q, max_k, 0.0, causal, *random,
        scale=scale,
    )  # fmt: skip


# -- the plain form: by the definition, segment by segment, on any device --------------------------------------------


def _segments(cu_q, cu_k, used_k=None) -> Iterator[tuple[slice, slice]]:
    """Places of the queries and of the keys."""
    starts, ends = cu_k.tolist(), cu_k[1:].tolist()
    if used_k is not None:
        ends = [start + used for start, used in zip(starts, used_k.tolist(), strict=False)]
    queries = cu_q.tolist()
    for i, end in enumerate(ends):
        yield slice(queries[i], queries[i + 1]), slice(starts[i], end)


def _scores(q_nHd: torch.Tensor, k_mKd: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """(H, n, m) float32, or float64 where the operands are."""
    scores = torch.einsum("nhd,mhd->hnm", q_nHd, k_mKd) * scale
    if not causal:
        return scores
    n, m = scores.shape[1:]
    if n != m:
        raise ValueError(f"a causal segment has as many keys as queries, not {n} queries and {m} keys")
    return scores.masked_fill(torch.ones(n, m, dtype=torch.bool, device=scores.device).triu(1), -torch.inf)


def _wide(x_LKd: torch.Tensor, heads: int) -> torch.Tensor:
    """At least float32, and one key head for each of `heads`."""
    wide = x_LKd.to(torch.promote_types(x_LKd.dtype, torch.float32))
    return wide.repeat_interleave(heads // x_LKd.shape[1], 1)


def _plain(q, k, v, cu_q, cu_k, max_q: int, max_k: int, causal: bool, scale: float, used_k=None) -> Any:
    heads = q.shape[1]
    out = torch.zeros_like(q)
    lse = _wide(q.new_zeros(1, heads, len(q)), heads)[0]
    for rows, keys in _segments(cu_q, cu_k, used_k):
        scores = _scores(_wide(q[rows], heads), _wide(k[keys], heads), causal, scale)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), _wide(v[keys], heads)).to(q.dtype)
    return out, lse


def _plain_backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q: int, max_k: int, causal: bool, scale: float) -> Any:
    heads = q.shape[1]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for rows, keys in _segments(cu_q, cu_k):
        q_nHd, out_nHd, do = (_wide(x[rows], heads) for x in (q, out, grad_out))
        k_mHd, v_mHd = (_wide(x[keys], heads) for x in (k, v))
        probs = (_scores(q_nHd, k_mHd, causal, scale) - lse[:, rows, None]).exp()
        pull = torch.einsum("nhd,mhd->hnm", do, v_mHd) - (do * out_nHd).sum(-1).t()[..., None]
        slope = probs * pull * scale
        dq[rows] = torch.einsum("hnm,mhd->nhd", slope, k_mHd).to(q.dtype)
        for target, weights, rows_nHd in ((dk, slope, q_nHd), (dv, probs, do)):
            total = torch.einsum("hnm,nhd->mhd", weights, rows_nHd)
            target[keys] = total.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)
    return dq, dk, dv


# -- whether the kernel is right here --------------------------------------------------------------------------------


def available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `varlen` runs as a kernel there. The first call of a process tries it, so not inside a CUDA graph."""
    return device.type == "cuda" and dtype in HALF and _checked(device, dtype, head_dim)


@functools.cache
def _checked(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    try:
        problem = disagreement(device, dtype, head_dim)
    except (RuntimeError, TypeError, AttributeError) as error:  # not built in, an older card, other arguments
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"torch {torch.__version__}: the flash attention kernel on {device} is not used for {dtype} and heads of "
            f"{head_dim}: {problem}. Training and sampling go on with slower attention",
            stacklevel=2,
        )
    return not problem


class _Case(NamedTuple):
    name: str
    heads: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool = False
    slots: tuple[int, ...] | None = None  # where the keys of each segment start, of _SLOT_KEYS


#: many more than are used, as at the start of a long completion
_SLOT_KEYS = 2048
_OWN, _PROMPTS = (37, 1, 150, 5), (150, 37, 5)
_CASES = (
    _Case("causal", 4, _OWN, _OWN, causal=True),
    _Case("causal without groups", 2, _OWN, _OWN, causal=True),
    _Case("prompt keys", 4, (200, 0, 3), _PROMPTS),
    _Case("prompt keys of single queries", 4, (1, 0, 1), _PROMPTS),
    _Case("slots", 4, (1, 1, 1), _PROMPTS, slots=(1300, 0, 640)),
    _Case("slots of several queries", 4, (7, 0, 2), _PROMPTS, slots=(1300, 0, 640)),
)


def disagreement(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What the kernel gets wrong on small cases, by comparison with the plain form on the CPU; empty if nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for case in _CASES:
            rows, keys = sum(case.queries), sum(case.keys) if case.slots is None else _SLOT_KEYS
            shapes = ((case.heads, rows), (2, keys), (2, keys), (case.heads, rows))  # q, k, v, gradient of out
            stored = [torch.randn(h, n + 3, head_dim, generator=generator).to(dtype) for h, n in shapes]
            if problem := _disagreement(case, stored, device, head_dim**-0.5):
                return f"{case.name}: {problem}"
    return ""


def _disagreement(case: _Case, stored: list[torch.Tensor], device: torch.device, scale: float) -> str:
    def laid_out(device: torch.device | str) -> list[torch.Tensor]:  # as part of a row that a model made, by head
        return [tensor.to(device).transpose(0, 1)[3:] for tensor in stored]

    starts, ends = (torch.tensor((0, *sizes)).cumsum(0, dtype=torch.int32) for sizes in (case.queries, case.keys))
    places, used = (starts, ends), None
    if case.slots is not None:
        places = (starts, torch.tensor((*case.slots, _SLOT_KEYS), dtype=torch.int32))
        used = torch.tensor(case.keys, dtype=torch.int32)
    longest = max(case.keys) if used is None else _SLOT_KEYS
    rest: tuple[int, int, bool, float] = (max(case.queries), longest, case.causal, scale)
    (q, k, v, do), (cu_q, cu_k) = laid_out("cpu"), places
    out, lse = _plain(q, k, v, cu_q, cu_k, *rest, used)
    (q2, k2, v2, do2), (cu_q2, cu_k2) = laid_out(device), (x.to(device) for x in places)
    ours = _kernel(q2, k2, v2, cu_q2, cu_k2, *rest, None if used is None else used.to(device))
    problem = _difference(("output", "log-sum-exp"), ours, (out, lse))
    if problem or used is not None:
        return problem
    lse, out = lse + 0.5, out / 2  # as in a softmax over more keys than these
    expected = _plain_backward(do, q, k, v, out, lse, cu_q, cu_k, *rest)
    ours = _kernel_backward(do2, q2, k2, v2, out.to(device), lse.to(device), cu_q2, cu_k2, *rest)
    return _difference(("dq", "dk", "dv"), ours, expected)


def _difference(names: tuple[str, ...], ours: Tensors, expected: Tensors) -> str:
    for name, mine, exact in zip(names, ours, expected, strict=True):
        mine = mine.float().cpu()
        if mine.shape != exact.shape:
            return f"{name} has the shape {tuple(mine.shape)}, not {tuple(exact.shape)}"
        exact, limit = exact.float(), LSE_TOLERANCE
        error = (mine - exact).abs().max()
        if name != "log-sum-exp":
            rows = exact.norm(dim=-1)
            typical = rows.square().mean().sqrt()
            error, limit = ((mine - exact).norm(dim=-1) / (rows + typical)).max(), ROW_TOLERANCE
        if not error <= limit:  # nan too
            return f"{name} is off by {float(error):.2g}, tolerance {limit}"
    return ""
