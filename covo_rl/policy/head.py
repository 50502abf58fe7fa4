"""Log-probs of completion tokens and their entropy, in chunks: no (N, C, V) tensor ever exists.

With a frozen head the forward pass already stores d logp / d h, (M, D), so that the backward is one multiply and the
logits are made once. With a trainable head the backward makes each chunk's logits a second time. A head that is not
a plain linear layer (adapters on it, sharded weights) is called as a module, chunk by chunk, under checkpointing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

#: logits held at once, in elements; 2**24 float32 are 64 MiB
CHUNK_ELEMENTS = 2**24


def token_logps(
    hidden_MD: torch.Tensor, targets_M: torch.Tensor, head: nn.Module, *,
    temperature: float = 1.0, entropy: bool = False, chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """log softmax(head(hidden) / temperature)[target] and, if asked for, the entropy in nats: (M,) float32 each.

    `hidden_MD` any float dtype, `targets_M` int64. Both results are differentiable in hidden and head. `chunk` is
    the number of positions at a time (default: so that a chunk of logits has at most CHUNK_ELEMENTS).
    """
    chunk = chunk or max(16, CHUNK_ELEMENTS // int(getattr(head, "out_features", 2**17)))
    if not (
        type(head) is nn.Linear
        and type(head.weight) in (nn.Parameter, torch.Tensor)  # whole, not a shard
        and head.weight.numel() > 0
        and not (head._forward_hooks or head._forward_pre_hooks)
    ):
        return _module_logps(hidden_MD, targets_M, head, temperature, entropy, chunk)
    logps_M, entropy_M = _LinearLogps.apply(hidden_MD, head.weight, head.bias, targets_M, temperature, entropy, chunk)
    return logps_M, entropy_M if entropy else None


def _scaled_logits(hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V, temperature: float) -> torch.Tensor:
    """float32 logits / temperature, as sampling computes them."""
    logits = torch.nn.functional.linear(hidden_MD, weight_VD, bias_V).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _LinearLogps(torch.autograd.Function):
    """(hidden, weight, bias) -> (logps_M, entropy_M)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_MD, weight_VD, bias_V, targets_M, temperature: float, entropy: bool, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        store = ctx.needs_input_grad[0] and not head_trains
        rows = hidden_MD.shape[0]
        logps_M = hidden_MD.new_empty(rows, dtype=torch.float32)
        entropy_M = hidden_MD.new_empty(rows if entropy else 0, dtype=torch.float32)
        slopes = [torch.empty_like(hidden_MD) for _ in range(1 + entropy)] if store else []
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = _scaled_logits(hidden_MD[part], weight_VD, bias_V, temperature)
            picked_c1 = logits.gather(1, targets_M[part, None])
            # in place: one chunk of logits is all that exists, two where the entropy is asked for
            highest_c1 = logits.amax(-1, keepdim=True)
            shifted_cV = logits.sub_(highest_c1)
            weights_cV = shifted_cV.exp() if entropy else shifted_cV.exp_()
            sums_c1 = weights_cV.sum(-1, keepdim=True)
            logps_M[part] = (picked_c1 - highest_c1 - sums_c1.log())[:, 0]
            if entropy:
                logps_cV, probs_cV = shifted_cV.sub_(sums_c1.log()), weights_cV.div_(sums_c1)
                entropy_M[part] = -torch.linalg.vecdot(probs_cV, logps_cV)
            if not store:
                continue
            expected = (weights_cV.to(weight_VD.dtype) @ weight_VD).float()
            expected = expected if entropy else expected / sums_c1
            slopes[0][part] = (weight_VD[targets_M[part]] - expected).mul_(1 / temperature)
            if entropy:
                weighted_cV = logps_cV.add_(entropy_M[part, None]).mul_(probs_cV)
                slopes[1][part] = (weighted_cV.to(weight_VD.dtype) @ weight_VD).mul_(-1 / temperature)
        ctx.head_trains, ctx.entropy, ctx.temperature, ctx.chunk = head_trains, entropy, temperature, chunk
        ctx.save_for_backward(*((hidden_MD, weight_VD, bias_V, targets_M) if head_trains else slopes))
        if not entropy:
            ctx.mark_non_differentiable(entropy_M)
        return logps_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_M, grad_entropy_M):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.head_trains:
            return (*_recomputed_gradients(ctx, grad_logps_M, grad_entropy_M), None, None, None, None)
        grad_hidden = None
        if slopes := ctx.saved_tensors:
            grad_hidden = slopes[0] * grad_logps_M[:, None].to(slopes[0].dtype)
            if ctx.entropy:
                grad_hidden += slopes[1] * grad_entropy_M[:, None].to(slopes[1].dtype)
        return grad_hidden, None, None, None, None, None, None


def _recomputed_gradients(ctx: Any, grad_logps_M: torch.Tensor, grad_entropy_M: torch.Tensor):
    """Gradients of hidden states, weight and bias (None where not asked for), from logits made a second time."""
    hidden_MD, weight_VD, bias_V, targets_M = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
    grad_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
    for start in range(0, hidden_MD.shape[0], ctx.chunk):
        part = slice(start, start + ctx.chunk)
        logps_cV = _scaled_logits(hidden_MD[part], weight_VD, bias_V, ctx.temperature).log_softmax(-1)
        probs_cV = logps_cV.exp()
        grad_c = grad_logps_M[part, None]
        slope_cV = probs_cV * -grad_c
        slope_cV.scatter_add_(1, targets_M[part, None], grad_c.to(slope_cV.dtype))
        if ctx.entropy:
            entropy_c = -(probs_cV * logps_cV).sum(-1, keepdim=True)
            slope_cV -= probs_cV * (logps_cV + entropy_c) * grad_entropy_M[part, None]
        slope_cV = slope_cV.div_(ctx.temperature).to(weight_VD.dtype)
        if grad_hidden is not None:
            grad_hidden[part] = slope_cV @ weight_VD
        if grad_weight is not None:
            grad_weight.addmm_(slope_cV.t(), hidden_MD[part].to(weight_VD.dtype))
        if grad_bias is not None:
            grad_bias += slope_cV.sum(0)
    return grad_hidden, grad_weight, grad_bias


def _module_logps(
    hidden_MD: torch.Tensor, targets_M: torch.Tensor, head: nn.Module, temperature: float, entropy: bool, chunk: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    def one(hidden_cD: torch.Tensor, targets_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        logps_cV = (head(hidden_cD).float() / temperature).log_softmax(-1)
        entropy_c = -(logps_cV.exp() * logps_cV).sum(-1) if entropy else None
        return logps_cV.gather(1, targets_c[:, None])[:, 0], entropy_c

    parts = zip(hidden_MD.split(chunk), targets_M.split(chunk), strict=True)
    logps, entropies = zip(*(checkpoint(one, *part, use_reentrant=False) for part in parts), strict=True)
    return torch.cat(logps), torch.cat(entropies) if entropy else None
