"""aten calls of a decode step: what is counted, and how many today's decoding makes."""

import json

import pytest
import torch
from typer.testing import CliRunner

from covo_rl.bench.calls import LAYERS, CallCounter, decode_calls

#: (dtype, folded) -> most calls a layer; with the modules of transformers and PEFT it was 98, 73 and 45
LIMITS = {(torch.bfloat16, False): 25, (torch.float32, False): 29, (torch.float32, True): 22}


def test_views_and_shape_queries_are_not_counted():
    x = torch.ones(4, 6)
    with CallCounter() as counter:
        y = x.view(2, 12).transpose(0, 1)[3:].unsqueeze(0).expand(5, -1, -1)
        assert (y.shape, y.numel()) == ((5, 9, 2), 90)
        z = x @ x.t()  # one product, its operand a view
        z.add_(1.0)
        assert float(z.sum()) == 16 * 7  # the sum, and reading it on the host, which waits for the device
    assert counter.calls == {"mm": 1, "add_": 1, "sum": 1, "_local_scalar_dense": 1}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_that_look_like_views_are_counted(mode):
    """`to` and `reshape` return their input where they can; in inference mode they arrive whole."""
    x = torch.ones(4, 6)
    with mode(), CallCounter() as counter:
        x.to(torch.float32).reshape(24)  # nothing to do
        assert not counter.calls
        x.to(torch.bfloat16)
        x.t().reshape(24)
        torch.nn.functional.linear(x, x)
    assert counter.calls == {"_to_copy": 1, "clone": 1, "mm": 1}


@pytest.mark.parametrize(("dtype", "folded"), LIMITS)
def test_a_decode_step_makes_at_most_so_many_calls(dtype, folded):
    """Four products (q k v together, gate and up together) and two norms are the least that a layer needs."""
    step = decode_calls(dtype, folded=folded)
    assert 6 < step.per_layer <= LIMITS[dtype, folded]
    assert 0 < step.outside <= 64
    assert step.total == LAYERS * step.per_layer + step.outside


def test_command_prints_what_it_counts(tmp_path, monkeypatch):
    from covo_rl.bench import calls, cli

    monkeypatch.setattr(calls, "decode_calls", lambda dtype, folded=False: calls.StepCalls({"mm": 9.0}, {"exp": 2.5}))
    path = tmp_path / "calls.json"
    done = CliRunner().invoke(cli.app, ["calls", "--json", str(path)])
    assert "9.0 a layer, 2.5 beside the layers, 254 a step" in done.output, done.output
    assert all(way == {"layer": {"mm": 9.0}, "rest": {"exp": 2.5}} for way in json.loads(path.read_text()).values())
