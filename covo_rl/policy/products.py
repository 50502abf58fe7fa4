"""Matrix products of 16-bit operands whose results are float32, never rounded to 16 bits in between.

On CUDA these are the sums that the matrix units make anyway, handed out whole (`out_dtype`), in one product. Elsewhere
float32 copies are multiplied, of BLOCK_ELEMENTS of a weight at a time. Other dtypes are multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)
#: elements of a weight that are copied to float32 at once, 128 MiB; of a gradient that CUDA adds at once, 1 GiB
BLOCK_ELEMENTS, CUDA_SUM_ELEMENTS = 2**25, 2**28
#: cuBLAS is 4 to 9 times slower where rows of a matrix do not begin at multiples of 16 bytes (Covo-Audio's vocabulary
#: of 168,055: 1.3 ms instead of 0.3 ms for a decode step's logits on an H200)
ALIGNED = 8


def operand_dtype(weight: torch.Tensor) -> torch.dtype:
    """What a linear layer multiplies this weight in: its own dtype, or the one that autocast asks for."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def operand(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight for several products in `dtype`: where they take it whole, it is rounded once."""
    return weight.to(dtype) if _takes_16_bits(weight) and dtype in HALF else weight


def _takes_16_bits(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def batched_product(a_BMK: torch.Tensor, b_BKN: torch.Tensor) -> torch.Tensor:
    """a @ b: float32 (B, M, N) where `b` has 16 bits; `a` may be float32, and is then rounded on CUDA."""
    if b_BKN.dtype not in HALF:
        return torch.bmm(a_BMK, b_BKN)
    with torch.autocast(b_BKN.device.type, enabled=False):  # it would round the result again
        if not _takes_16_bits(b_BKN):
            return torch.bmm(a_BMK.float(), b_BKN.float())
        return torch.bmm(a_BMK.to(b_BKN.dtype), b_BKN, out_dtype=torch.float32)


def _product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    return batched_product(a_MK[None], b_KN[None])[0]


def _product_into(out_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    if out_MN.device.type == "cuda":
        with torch.autocast("cuda", enabled=False):
            torch.mm(a_MK, b_KN, out_dtype=torch.float32, out=out_MN)
    else:
        out_MN.copy_(_product(a_MK, b_KN))


def _blocks(weight_VD: torch.Tensor, elements_on_cuda: int | None = None) -> list[slice]:
    """Rows of a weight that are multiplied at once; those beyond the last multiple of ALIGNED apart from the others."""
    elements = (elements_on_cuda or weight_VD.numel()) if _takes_16_bits(weight_VD) else BLOCK_ELEMENTS
    total, step = weight_VD.shape[0], max(1, elements // weight_VD.shape[1])
    step = step // ALIGNED * ALIGNED or step
    whole = total // ALIGNED * ALIGNED
    bounds = sorted({*range(0, whole, step), whole, total})
    return [slice(start, end) for start, end in pairwise(bounds)]


def logits_of(x_cD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, dtype: torch.dtype):
    """x @ weight.T + bias of operands in `dtype`: (c, V) float32, of 16-bit ones as part of a wider tensor."""
    if dtype not in HALF:
        return nn.functional.linear(x_cD, weight_VD, bias_V).float()
    x_cD, rows = x_cD.to(dtype), weight_VD.shape[0]
    out_cV = x_cD.new_empty(x_cD.shape[0], rows + -rows % ALIGNED, dtype=torch.float32)[:, :rows]
    for block in _blocks(weight_VD):
        _product_into(out_cV[:, block], x_cD, weight_VD[block].to(dtype).t())
    return out_cV if bias_V is None else out_cV.add_(bias_V.to(dtype))


def weight_sum(slope_cV: torch.Tensor, weight_VD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """slope @ weight for a float32 slope and a weight in `dtype`: (c, D), float32 where that has 16 bits."""
    if dtype not in HALF:
        return slope_cV.to(dtype) @ weight_VD
    parts = (_product(slope_cV[:, block], weight_VD[block].to(dtype)) for block in _blocks(weight_VD))
    return reduce(torch.Tensor.add_, parts)


def add_outer(total_VD: torch.Tensor, slope_cV: torch.Tensor, x_cD: torch.Tensor, dtype: torch.dtype) -> None:
    """total += slope.T @ x in place, for a float32 slope and x in `dtype`; where that has 16 bits, a float32 total."""
    if dtype not in HALF:
        total_VD.addmm_(slope_cV.t().to(dtype), x_cD.to(dtype))
        return
    for block in _blocks(total_VD, CUDA_SUM_ELEMENTS):
        total_VD[block] += _product(slope_cV[:, block].contiguous().t(), x_cD.to(dtype))


class _Linear(torch.autograd.Function):
    """`nn.functional.linear` of 16-bit operands, float32 out, with gradients from the unrounded slope."""

    @staticmethod
    def forward(ctx: Any, x_cD, weight_VD, bias_V, dtype: torch.dtype):  # pyright: ignore
        ctx.save_for_backward(x_cD, weight_VD, bias_V)
        ctx.dtype = dtype
        return logits_of(x_cD, weight_VD, bias_V, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_cV):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_cD, weight_VD, bias_V = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = weight_sum(slope_cV, weight_VD, ctx.dtype).to(x_cD.dtype)
        if ctx.needs_input_grad[1]:
            add_outer(total := torch.zeros_like(weight_VD, dtype=torch.float32), slope_cV, x_cD, ctx.dtype)
            grad_weight = total.to(weight_VD.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = slope_cV.sum(0).to(bias_V.dtype)
        return grad_x, grad_weight, grad_bias, None


class _Float32Linear(TorchFunctionMode):
    """Linear layers called inside give float32 for 16-bit operands."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        if func is nn.functional.linear and not kwargs:
            operands: tuple[Any, ...] = (*args, None)
            x, weight, bias = operands[:3]
            if type(weight) in (nn.Parameter, torch.Tensor) and (dtype := operand_dtype(weight)) in HALF:
                return _Linear.apply(x.flatten(0, -2), weight, bias, dtype).unflatten(0, x.shape[:-1])
        return func(*args, **(kwargs or {}))


def mix_in(module: nn.Module, mixin: type) -> None:
    """Put `mixin` before the module's class, once; name and home stay: decoding knows by them what a module does.

    A class, not a function on the instance, whose copies would call the original's parameters.
    """
    kind = type(module)
    if not issubclass(kind, mixin):
        module.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


@contextmanager
def whole_float32() -> Iterator[None]:
    """Inside, float32 products are made in float32, whether or not the run allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _ExactAngles:
    """Mixed into the class of a module that multiplies positions by frequencies."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with whole_float32():
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def keep_angles_exact(model: nn.Module) -> None:
    """Rotary positions are multiplied in whole float32 whatever the setting: TF32 makes 2048 of position 2049.

    transformers makes their angles by a matrix product (its issue 48428: wrong on a B200).
    """
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            mix_in(module, _ExactAngles)


@contextmanager
def float32_head(head: nn.Module) -> Iterator[None]:
    """Inside, whatever calls `head` gets float32 logits, not rounded to 16 bits first."""
    original = head.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        with _Float32Linear():
            return original(*args, **kwargs)

    own = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def float32_logits(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """`head(hidden).float()`, whatever the head is made of (adapters, shards), without rounding to 16 bits first."""
    with _Float32Linear():
        return head(hidden).float()
