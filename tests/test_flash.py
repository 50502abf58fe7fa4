"""The seam of the CUDA attention kernel: its plain form is right, and the self-check finds a kernel that is not."""

import policy_cases as cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from covo_rl.policy import flash
from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.packing import pack


def _cu(lengths) -> torch.Tensor:
    return torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)


def _operands(queries: int, keys: int, dtype: torch.dtype, heads: int = 4, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = ((queries, heads, width), (keys, 2, width), (keys, 2, width))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("queries", "keys", "causal"), [((5, 1, 3), (5, 1, 3), True), ((4, 0, 1), (3, 6, 2), False)])
def test_plain_form_against_autograd_in_float64(queries, keys, causal):
    q, k, v = (x.requires_grad_() for x in _operands(sum(queries), sum(keys), torch.float64))
    cu_q, cu_k, rest = _cu(queries), _cu(keys), (max(queries), max(keys))
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    expected = torch.cat([
        scaled_dot_product_attention(
            *(x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in part), is_causal=causal, scale=0.3
        ).transpose(0, 1)
        for part in parts if len(part[0])
    ])  # fmt: skip
    weight = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    out, lse = flash.varlen(q.detach(), k.detach(), v.detach(), cu_q, cu_k, *rest, causal=causal, scale=0.3)
    assert lse.shape == (4, sum(queries))
    torch.testing.assert_close(out, expected.detach(), atol=1e-12, rtol=0)
    operands = (weight, *(x.detach() for x in (q, k, v)), out, lse)
    ours = flash.varlen_backward(*operands, cu_q, cu_k, *rest, causal=causal, scale=0.3)
    for mine, exact in zip(ours, grads, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-12, rtol=0)


def test_both_parts_of_a_packed_row_merge_to_the_gradient_of_the_whole():
    """Finite differences in float64 of the layout that CUDA uses, with an empty completion and a prompt without any."""
    made = cases.policy()
    prompts = cases.prompts(made, seconds=((), (), ()))
    groups = [cases.group(prompt, lengths) for prompt, lengths in zip(prompts, ((3, 1, 2), (1,), (4,)), strict=True)]
    packed = pack(groups, made.family.audio_token_id, "cpu")
    operands = _operands(len(packed.input_ids_L), len(packed.input_ids_L), torch.float64, width=2)
    layout = PackedLayout(packed, method="varlen")
    assert torch.autograd.gradcheck(
        lambda *qkv: layout.attend(0, *qkv, 0.3), [x.requires_grad_() for x in operands], fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_used_keys_of_slots_are_the_same_keys_packed(dtype):
    queries, used, starts = (2, 0, 1), (3, 1, 8), (16, 0, 8)
    q, k, v = _operands(3, 24, dtype)
    packed_k, packed_v = (torch.cat([x[s : s + n] for s, n in zip(starts, used, strict=True)]) for x in (k, v))
    expected = flash.varlen(q, packed_k, packed_v, _cu(queries), _cu(used), 2, 8, causal=False, scale=0.3)
    cu_k, used_k = torch.tensor((*starts, 24), dtype=torch.int32), torch.tensor(used, dtype=torch.int32)
    ours = flash.varlen(q, k, v, _cu(queries), cu_k, 2, 8, causal=False, scale=0.3, used_k=used_k)
    for mine, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, exact, atol=0, rtol=0)


def test_a_causal_segment_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="not 3 queries and 5 keys"):
        flash.varlen(*_operands(3, 5, torch.float32), _cu([3]), _cu([5]), 3, 5, causal=True, scale=1.0)


def test_the_kernel_is_asked_for_what_it_gives():
    """Shapes, dtypes and argument names, as torch itself describes them for CUDA."""
    with FakeTensorMode():
        q, k, v = (torch.empty(n, h, 64, dtype=torch.bfloat16, device="cuda") for n, h in ((30, 4), (20, 2), (20, 2)))
        cu, used = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (4, 3))
        for extra in (None, used):
            out, lse = flash._kernel(q, k, v, cu, cu, 20, 10, False, 0.1, extra)
            assert (out.shape, out.dtype) == (q.shape, q.dtype)
            assert (lse.shape, lse.dtype) == ((4, 30), torch.float32)
        grads = flash._kernel_backward(out, q, k, v, out, lse, cu, cu, 20, 10, True, 0.1)
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


# -- the self-check --------------------------------------------------------------------------------------------------


_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _runs(cu_q, cu_k):
    return [pair for pair in flash._segments(cu_q, cu_k) if pair[0].stop > pair[0].start]


def _block(x_LHd, places, heads):
    return x_LHd[places].repeat_interleave(heads // x_LHd.shape[1], 1).transpose(0, 1)[None]


def _rounding(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, used_k=None):
    """What a real 16-bit kernel does, torch's for the CPU: probabilities are rounded to 16 bits on the way."""
    out, lse = flash._plain(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, used_k)
    for rows, keys in _runs(cu_q, cu_k) if used_k is None else []:
        operands = (_block(x, places, q.shape[1]) for x, places in ((q, rows), (k, keys), (v, keys)))
        block, total = _cpu(*operands, 0.0, causal, scale=scale)
        out[rows], lse[:, rows] = block[0].transpose(0, 1), total[0]
    return out, lse


def _rounding_backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, keys in _runs(cu_q, cu_k):
        places = ((grad_out, rows), (q, rows), (k, keys), (v, keys), (out, rows))
        operands = (_block(x, place, q.shape[1]) for x, place in places)
        blocks = _cpu_backward(*operands, lse[None, :, rows].contiguous(), 0.0, causal, scale=scale)
        for grad, block, place in zip(grads, blocks, (rows, keys, keys), strict=True):
            grad[place] = block[0].transpose(0, 1).unflatten(1, (grad.shape[1], -1)).sum(2)
    return tuple(grads)


def _other_heads(form, which):
    """A kernel that takes key head h % K for query head h, where h // (H / K) is meant."""

    def wrong(*args):
        args = list(args)
        if args[which].shape[1] != args[which + 1].shape[1]:
            args[which] = args[which][:, [0, 2, 1, 3]]
        return form(*args)

    return wrong


def _full(form, place):
    """A kernel that knows no causal mask."""
    return lambda *args: form(*(False if i == place else x for i, x in enumerate(args)))


def _raising(*_):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def _own_lse(*args):
    """A backward that makes its own log-sum-exp and does not look at the one that it is given."""
    grad_out, q, k, v, _, _, *rest = args
    out, lse = flash._plain(q, k, v, *rest)
    return flash._plain_backward(grad_out, q, k, v, out, lse, *rest)


PLAIN = (flash._plain, flash._plain_backward)


@pytest.mark.parametrize(
    ("forward", "backward", "message"),
    [
        (_rounding, _rounding_backward, ""),
        (_other_heads(PLAIN[0], 0), PLAIN[1], "causal: output is off by"),
        (PLAIN[0], _other_heads(PLAIN[1], 1), "causal: dq is off by"),
        (_full(PLAIN[0], 7), PLAIN[1], "causal: output is off by"),
        (PLAIN[0], _own_lse, "causal: dq is off by"),
        (lambda *args: PLAIN[0](*args[:9]), PLAIN[1], "slots: output"),
        (lambda *args: (PLAIN[0](*args)[0], PLAIN[0](*args)[1].t()), PLAIN[1], "log-sum-exp has the shape"),
        (lambda *args: (PLAIN[0](*args)[0], PLAIN[0](*args)[1] * 1.01), PLAIN[1], "log-sum-exp is off by"),
        (lambda *args: (PLAIN[0](*args)[0] * torch.nan, PLAIN[0](*args)[1]), PLAIN[1], "off by nan"),
        (_raising, PLAIN[1], "only supports Ampere"),
    ],
    ids=["rounding", "heads", "heads back", "mask", "own lse", "slots", "shape", "lse", "nan", "raises"],
)
def test_self_check(monkeypatch, forward, backward, message):
    monkeypatch.setattr(flash, "_kernel", forward)
    monkeypatch.setattr(flash, "_kernel_backward", backward)
    flash._checked.cache_clear()
    if not message:
        assert flash._checked(torch.device("cpu"), torch.bfloat16, 16)
    else:
        with pytest.warns(UserWarning, match=rf"torch {torch.__version__[:4]}.*{message}"):
            assert not flash._checked(torch.device("cpu"), torch.bfloat16, 16)
    flash._checked.cache_clear()


def test_no_kernel_on_a_cpu_or_in_float32():
    assert not flash.available(torch.device("cpu"), torch.bfloat16, 64)
    assert not flash.available(torch.device("cuda"), torch.float32, 64)
