"""What a DeepSpeed launch may ask for, and the parts of its update that need no DeepSpeed.

The trainer under DeepSpeed itself, on two ranks: faults/test_trainer_ranks.py and faults/test_recipe_ranks.py.
"""

import math
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from covo_rl.config import ConfigError
from covo_rl.policy.sharding import is_sharded, put, torch_linear, whole, whole_shape
from covo_rl.train import launch, zero

GOOD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}, "bf16": {"enabled": False}}


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "no", "zero_stage 1: there are 2 and 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "no",
            "offload_optimizer to 'cpu'",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "no", "offload_param to 'nvme'"),
        ({"optimizer": {"type": "AdamW"}}, "no", "'optimizer' of the DeepSpeed file: leave it out"),
        ({"scheduler": {}}, "no", "'scheduler'"),
        ({"bf16": {"enabled": True}}, "bf16", "bf16 under DeepSpeed: use --mixed_precision bf16"),
        ({"fp16": {"enabled": True}}, "no", "fp16 under DeepSpeed"),
        ({"bfloat16": {"enabled": True}}, "no", "bfloat16 under DeepSpeed"),  # DeepSpeed's older name
        ({"amp": {"enabled": True}}, "no", "amp under DeepSpeed"),
        ({}, "fp16", "fp16 under DeepSpeed"),
    ],
)
def test_what_cannot_be_had_under_deepspeed_is_refused(changes, precision, message):
    assert zero.refused(GOOD, "bf16") == zero.refused(GOOD, "no") == []
    (problem,) = zero.refused({**GOOD, **changes}, precision)
    assert message in problem


def test_the_trainer_settles_what_accelerate_cannot_know():
    """There is no data loader to take a batch size from; float32 gradients; autocast only where asked for."""
    plain, half = (zero.settings(precision, ranks=8) for precision in ("no", "bf16"))
    assert (plain["train_micro_batch_size_per_gpu"], plain["train_batch_size"]) == (1, 8)
    assert plain["gradient_accumulation_steps"] == 1, "passes are counted by the normaliser"
    assert plain["torch_autocast"]["enabled"] is False and half["torch_autocast"]["enabled"] is True
    assert half["torch_autocast"]["lower_precision_safe_modules"] == []


def test_a_launch_without_deepspeed_names_what_to_do(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'covo-rl\[deepspeed\]'.*fsdp2.yaml"):
        launch.join()


def test_clipping_is_handed_over_and_what_deepspeed_cannot_train_is_refused():
    config = {"zero_optimization": {"stage": 3}}
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16().requires_grad_(False))
    model.embedder = SimpleNamespace(frozen=True)
    zero.set_gradient_limit(accelerator, model, 0.5)
    assert config["gradient_clipping"] == 0.5
    model[1].weight.requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"must be float32, and 1 parameters are not, e.g. 1.weight \(torch.bfloat16\)"
    ):
        zero.set_gradient_limit(accelerator, model, 0.5)
    model[1].requires_grad_(False)
    model.embedder.frozen = False
    with pytest.raises(ConfigError, match="under ZeRO-3 encoder and audio adapter must stay frozen"):
        zero.set_gradient_limit(accelerator, model, 0.5)
    config["zero_optimization"]["stage"] = 2
    zero.set_gradient_limit(accelerator, model, 0.5)


class Engine:
    """Steps where the gradient is finite, as DeepSpeed does with float32 parameters."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter, self.boundaries, self.applied = parameter, [], False

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.applied = bool(self.parameter.grad.isfinite().all())

    def was_step_applied(self) -> bool:
        return self.applied

    def get_global_grad_norm(self) -> torch.Tensor:
        return self.parameter.grad.norm()


@pytest.mark.parametrize(("offset", "finite"), [(0.0, True), (math.nan, False), (math.inf, False)])
def test_a_loss_that_is_not_finite_spoils_the_update_even_if_its_gradient_is(offset, finite):
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    engine = Engine(weight)
    zero.backward(engine, weight.sum() * 0.0 + (weight**2).sum() / 2, last=False)
    zero.backward(engine, (weight**2).sum() / 2 + offset, last=True)  # the gradient does not see the offset
    assert engine.boundaries == [False, True]
    norm = zero.step(engine)
    assert norm == (pytest.approx(10.0) if finite else math.inf)


def test_a_parameter_in_pieces_is_gathered_and_put_back(monkeypatch):
    """A stand-in for DeepSpeed's: outside the context a parameter is empty, and changes count with a modifier_rank."""
    full = torch.arange(6.0).view(2, 3)
    layer = torch.nn.Linear(3, 2, bias=False)
    weight = layer.weight
    weight.data, weight.ds_id, weight.ds_shape, stored = torch.empty(0), 0, full.shape, [full.clone()]

    @contextmanager
    def gathered(parameters, modifier_rank=None):
        (parameter,) = parameters
        parameter.data = stored[0].clone()
        yield
        if modifier_rank is not None:
            stored[0] = parameter.data.clone()
        parameter.data = torch.empty(0)

    module = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered))
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    assert is_sharded(layer) and whole_shape(weight) == (2, 3)
    assert torch.equal(whole(weight), full) and not whole(weight).requires_grad
    put(weight, full + 1)
    assert weight.numel() == 0 and torch.equal(whole(weight), full + 1)


def test_torchs_linear_function_is_back_for_a_while():
    own, replacement = torch.nn.functional.linear, lambda *_: None
    torch.nn.functional.linear = replacement  # as ZeRO-3 does for good
    try:
        with torch_linear():
            assert torch.nn.functional.linear is own
        assert torch.nn.functional.linear is replacement
    finally:
        torch.nn.functional.linear = own
