"""Log-probs of completion tokens and their entropy, in chunks: no (N, C, V) tensor ever exists.

With a frozen head the forward pass already stores d logp / d h, (M, D), so that the backward is one multiply and the
logits are made once. With a trainable head the backward makes each chunk's logits a second time. A head that is not
a plain linear layer (adapters on it, sharded weights) is called as a module, chunk by chunk, under checkpointing.

16-bit operands (a 16-bit model, or autocast) give float32 logits and slopes (products.py): at p(target) near 1 a logp's
gradient is a small difference, `(p - onehot) @ W`, of which rounding any larger number on the way leaves little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from covo_rl.policy.products import HALF, add_outer, float32_logits, logits_of, operand, operand_dtype, weight_sum

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

#: float32 logits held at once, in elements: 64 MiB
CHUNK_ELEMENTS = 2**24
#: on CUDA as many rows as keep the matrix units busy while the head is read, 512 MiB, but no more than 1/64 of the card
CUDA_CHUNK_ELEMENTS, CUDA_CHUNK_SHARE = 2**27, 1 / 64


def chunk_elements(device: torch.device | None = None) -> int:
    """float32 logits held at once on this device (default: a GPU where there is one).

    It depends on the card's size and not on what is free, so that every pass of a run cuts alike: a chunk's size
    changes the rounding of products, and of the sum of a trained head's gradient.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return CHUNK_ELEMENTS
    size = torch.cuda.get_device_properties(device).total_memory
    return min(CUDA_CHUNK_ELEMENTS, int(size * CUDA_CHUNK_SHARE) // 4)


#: a logit that leaves its id no share of the softmax; finite, so that p log p is 0 and not nan
NEVER = -1e30


def head_of(family: AudioFamily) -> nn.Module | _SampledIds:
    """What makes logits of hidden states: the family's head, without the ids that are never drawn where there are any.

    Sampling and scoring both take this one, so that their distributions are the same.
    """
    return _SampledIds(family.lm_head, family.unsampled_ids) if family.unsampled_ids else family.lm_head


class _SampledIds:
    """A head whose logits of `ids` are NEVER, in float32. No module: what it calls stays where it is."""

    def __init__(self, head: nn.Module, ids: Sequence[int]) -> None:
        self.head = head
        self.ids_U = torch.tensor(ids, device=next(head.parameters()).device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden).float().index_fill(-1, self.ids_U, NEVER)

    def modules(self) -> Iterator[nn.Module]:
        return self.head.modules()


def token_logps(
    hidden_MD: torch.Tensor, targets_M: torch.Tensor, head: nn.Module | _SampledIds, *,
    temperature: float = 1.0, entropy: bool = False, chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """log softmax(head(hidden) / temperature)[target] and, if asked for, the entropy in nats: (M,) float32 each.

    `hidden_MD` any float dtype, `targets_M` int64. Both results are differentiable in hidden and head. `chunk` is
    the number of positions at a time (default: at most `chunk_elements` logits, but at least 16 positions).
    """
    linear = _linear_layer(head)
    width = linear.out_features if linear else max((getattr(m, "out_features", 0) for m in head.modules()), default=0)
    rows = chunk or max(16, chunk_elements(hidden_MD.device) // (width or 2**17))
    if linear is None:
        return _module_logps(hidden_MD, targets_M, head, temperature, entropy, rows)
    dtype = operand_dtype(linear.weight)
    with torch.autocast(hidden_MD.device.type, enabled=False):  # of entropies it would make 16-bit products
        logps_M, entropy_M = _LinearLogps.apply(
            hidden_MD, linear.weight, linear.bias, targets_M, temperature, entropy, rows, dtype
        )
    return logps_M, entropy_M if entropy else None


def _linear_layer(head: Any) -> nn.Linear | None:
    """The whole linear layer that a call of `head` comes down to; None where the call does more."""
    if hasattr(head, "modules_to_save"):  # PEFT: trained in full beside LoRA
        active = head.active_adapters
        head = head.original_module if head.disable_adapters or len(active) != 1 else head.modules_to_save[active[0]]
    plain = (
        type(head) is nn.Linear
        and type(head.weight) in (nn.Parameter, torch.Tensor)  # whole, not a shard
        and head.weight.numel() > 0
        and not (head._forward_hooks or head._forward_pre_hooks)
    )
    return head if plain else None


def _scaled_logits(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """float32 logits / temperature, as sampling computes them."""
    logits = logits_of(hidden_MD, weight_VD, bias_V, dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _less_target(probs_cV: torch.Tensor, targets_c: torch.Tensor) -> torch.Tensor:
    """p - onehot, in place; the target's is minus the sum of the others, so that none of it is lost near p = 1."""
    targets_c1 = targets_c[:, None]
    probs_cV.scatter_(1, targets_c1, 0.0)
    return probs_cV.scatter_(1, targets_c1, -probs_cV.sum(-1, keepdim=True))


def _logits_slope(logps_cV: torch.Tensor, targets_c: torch.Tensor, grad_logps_c, grad_entropy_c) -> torch.Tensor:
    """Minus the gradient of the logits over the temperature; `grad_entropy_c` may be None."""
    probs_cV = logps_cV.exp()
    pull_cV = 0.0
    if grad_entropy_c is not None:
        entropy_c1 = -(probs_cV * logps_cV).sum(-1, keepdim=True)
        pull_cV = probs_cV * (logps_cV + entropy_c1) * grad_entropy_c[:, None]
    return _less_target(probs_cV, targets_c) * grad_logps_c[:, None] + pull_cV


class _LinearLogps(torch.autograd.Function):
    """(hidden, weight, bias) -> (logps_M, entropy_M)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_MD, weight_VD, bias_V, targets_M, temperature: float, entropy: bool, chunk: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        store = ctx.needs_input_grad[0] and not head_trains
        rows, ready_VD = hidden_MD.shape[0], operand(weight_VD, dtype)
        logps_M = hidden_MD.new_empty(rows, dtype=torch.float32)
        entropy_M = hidden_MD.new_empty(rows if entropy else 0, dtype=torch.float32)
        kept = torch.float32 if entropy else hidden_MD.dtype  # two slopes may nearly cancel
        slopes = [torch.empty_like(hidden_MD, dtype=kept) for _ in range(1 + entropy)] if store else []
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            targets_c = targets_M[part]
            logits = _scaled_logits(hidden_MD[part], ready_VD, bias_V, temperature, dtype)
            targets_c1 = targets_c[:, None]
            # in place: one chunk of logits is all that exists, two where the entropy is asked for
            shifted_cV = logits.sub_(logits.amax(-1, keepdim=True))
            picked_c1 = shifted_cV.gather(1, targets_c1)
            weights_cV = shifted_cV.exp() if entropy else shifted_cV.exp_()
            others_c1 = weights_cV.scatter_(1, targets_c1, 0.0).sum(-1, keepdim=True)
            sums_c1 = others_c1 + picked_c1.exp()
            logps_M[part] = (picked_c1 - sums_c1.log())[:, 0]
            scale_c1 = -1 / (temperature * sums_c1)
            if entropy:
                weights_cV.scatter_(1, targets_c1, picked_c1.exp())
                logps_cV = shifted_cV.sub_(sums_c1.log())
                entropy_M[part] = -torch.linalg.vecdot(weights_cV, logps_cV) / sums_c1[:, 0]
                if store:
                    weighted_cV = logps_cV.add_(entropy_M[part, None]).mul_(weights_cV)
                    slopes[1][part] = weight_sum(weighted_cV, ready_VD, dtype).mul_(scale_c1)
            if store:  # p - onehot: the target's is minus the sum of the others, as in `_less_target`
                weights_cV.scatter_(1, targets_c1, -others_c1)
                slopes[0][part] = weight_sum(weights_cV, ready_VD, dtype).mul_(scale_c1)
        ctx.head_trains, ctx.entropy, ctx.temperature, ctx.chunk = head_trains, entropy, temperature, chunk
        ctx.dtype, ctx.hidden_dtype = dtype, hidden_MD.dtype
        ctx.save_for_backward(*((hidden_MD, weight_VD, bias_V, targets_M) if head_trains else slopes))
        if not entropy:
            ctx.mark_non_differentiable(entropy_M)
        return logps_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_M, grad_entropy_M):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.head_trains:
            return (*_recomputed_gradients(ctx, grad_logps_M, grad_entropy_M), *[None] * 5)
        grad_hidden = None
        if slopes := ctx.saved_tensors:
            grad_hidden = torch.empty_like(slopes[0], dtype=ctx.hidden_dtype)
            grads = (grad_logps_M, grad_entropy_M)[: len(slopes)]
            for start in range(0, len(grad_hidden), ctx.chunk):  # each sum is float32 and rounded once
                part = slice(start, start + ctx.chunk)
                grad_hidden[part] = sum(s[part] * g[part, None] for s, g in zip(slopes, grads, strict=True))
        return grad_hidden, *[None] * 7


def _recomputed_gradients(ctx: Any, grad_logps_M: torch.Tensor, grad_entropy_M: torch.Tensor):
    """Gradients of hidden states, weight and bias (None where not asked for), from logits made a second time."""
    hidden_MD, weight_VD, bias_V, targets_M = ctx.saved_tensors
    ready_VD = operand(weight_VD, ctx.dtype)
    total = torch.float32 if ctx.dtype in HALF else None  # summed over chunks, rounded once
    grad_hidden = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight_VD, dtype=total) if ctx.needs_input_grad[1] else None
    grad_bias = torch.zeros_like(bias_V, dtype=total) if ctx.needs_input_grad[2] else None
    for start in range(0, hidden_MD.shape[0], ctx.chunk):
        part = slice(start, start + ctx.chunk)
        logps_cV = _scaled_logits(hidden_MD[part], ready_VD, bias_V, ctx.temperature, ctx.dtype).log_softmax(-1)
        grad_entropy_c = grad_entropy_M[part] if ctx.entropy else None
        slope_cV = _logits_slope(logps_cV, targets_M[part], grad_logps_M[part], grad_entropy_c)
        slope_cV.div_(-ctx.temperature)
        if grad_hidden is not None:
            grad_hidden[part] = weight_sum(slope_cV, ready_VD, ctx.dtype)
        if grad_weight is not None:
            add_outer(grad_weight, slope_cV, hidden_MD[part], ctx.dtype)
        if grad_bias is not None:
            grad_bias += slope_cV.sum(0)
    weight, bias = (None if g is None else g.to(weight_VD.dtype) for g in (grad_weight, grad_bias))
    return grad_hidden, weight, bias


class _LogitsLogps(torch.autograd.Function):
    """float32 logits -> (logps_c, entropy_c); softmax's own backward, 1 - p, has little left of it near p = 1."""

    @staticmethod
    def forward(ctx: Any, logits_cV, targets_c, entropy: bool):  # pyright: ignore[reportIncompatibleMethodOverride]
        logps_cV, ctx.entropy = logits_cV.log_softmax(-1), entropy
        ctx.save_for_backward(logps_cV, targets_c)
        entropy_c = -(logps_cV.exp() * logps_cV).sum(-1) if entropy else logps_cV.new_empty(0)
        return logps_cV.gather(1, targets_c[:, None])[:, 0], entropy_c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_c, grad_entropy_c):  # pyright: ignore[reportIncompatibleMethodOverride]
        logps_cV, targets_c = ctx.saved_tensors
        slope_cV = _logits_slope(logps_cV, targets_c, grad_logps_c, grad_entropy_c if ctx.entropy else None)
        return slope_cV.neg_(), None, None


def _module_logps(
    hidden_MD: torch.Tensor, targets_M: torch.Tensor, head: Any, temperature: float, entropy: bool, chunk: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    def one(hidden_cD: torch.Tensor, targets_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _LogitsLogps.apply(float32_logits(head, hidden_cD) / temperature, targets_c, entropy)

    parts = zip(hidden_MD.split(chunk), targets_M.split(chunk), strict=True)
    logps, entropies = zip(*(checkpoint(one, *part, use_reentrant=False) for part in parts), strict=True)
    return torch.cat(logps), torch.cat(entropies) if entropy else None
