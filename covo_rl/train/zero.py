"""DeepSpeed's ZeRO-2 and ZeRO-3: what a launch may ask for, the update, and its optimiser's state by parameter name.

DeepSpeed sees float32 parameters only, and computes in bfloat16 by autocast; its own bf16 mode would round LoRA and
full weights alike. Its optimiser holds this rank's slices of all parameters in flat tensors, from which checkpoints
take whole ones and into which they put them, so that they are those of any other launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, is_deepspeed_available
from torch import Tensor, nn

from covo_rl.config import ConfigError
from covo_rl.policy import Policy
from covo_rl.records.console import console

#: what is weaker than without DeepSpeed
NOTE = ("DeepSpeed: an update that is not finite is passed over and counted, but its dump cannot name the parameters "
        "whose gradients were at fault")  # fmt: skip
INSTALL = "DeepSpeed is not installed: pip install 'covo-rl[deepspeed]', or launch with recipes/accelerate/fsdp2.yaml"


def require_deepspeed() -> None:
    """Raises ConfigError where the package is missing."""
    if not is_deepspeed_available():
        raise ConfigError([INSTALL])


def settle(accelerator: Accelerator, precision: str) -> None:
    """Put DeepSpeed's configuration in order for this trainer; also where accelerate leaves it off, on CPUs.

    Raises:
        ConfigError: the launch asks for what the trainer does itself or what was never tried.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    state = accelerator.state
    if state.distributed_type != DistributedType.DEEPSPEED:
        plugin = DeepSpeedPlugin()
        plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = plugin
        # in both, for whoever asks for the state later renews one from the other
        PartialState().distributed_type = state.distributed_type = DistributedType.DEEPSPEED
    config = _config(accelerator)
    if problems := refused(config, precision):
        raise ConfigError(problems)
    if accelerator.is_main_process:
        console.print(NOTE, markup=False)
    unset_hf_deepspeed_config()  # every rank loads whole weights, which checks and evaluation look at; shared out later
    config.update(settings(precision, accelerator.num_processes))


def refused(config: Mapping[str, Any], precision: str) -> list[str]:
    """What cannot be had, one line each."""
    zero = config.get("zero_optimization", {})
    problems = []
    if (stage := zero.get("stage")) not in (2, 3):
        problems.append(f"DeepSpeed's zero_stage {stage}: there are 2 and 3")
    for part in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(part) or {}).get("device", "none")) not in ("none", None):
            problems.append(f"DeepSpeed's {part} to {device!r} was never tried with this trainer: set none")
    for section in ("optimizer", "scheduler"):
        if section in config:
            problems.append(f"the section {section!r} of the DeepSpeed file: leave it out, the trainer has its own")
    on = [name for name in ("fp16", "bf16", "bfloat16", "amp") if config.get(name, {}).get("enabled") is True]
    if on or precision == "fp16":
        problems.append(f"{' and '.join(on) or 'fp16'} under DeepSpeed: use --mixed_precision bf16, which keeps "
                        "float32 weights and computes in 16 bits, or no")  # fmt: skip
    return problems


def settings(precision: str, ranks: int) -> dict[str, Any]:
    """DeepSpeed options that are the trainer's to set: there is no data loader, and one update has many passes."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": ranks,
        "gradient_accumulation_steps": 1,
        # gradients travel in float32: no module is safe in lower precision
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def set_gradient_limit(accelerator: Accelerator, policy: Policy, limit: float) -> None:
    """Clipping is DeepSpeed's part; before `accelerator.prepare`. 0 is none.

    Raises:
        ConfigError: a 16-bit parameter trains, for which DeepSpeed would neither keep float32 nor see NaN; or under
            ZeRO-3 the encoder or its adapter, whose passes differ between ranks.
    """
    if _config(accelerator)["zero_optimization"]["stage"] == 3 and not policy.embedder.frozen:
        raise ConfigError(["under ZeRO-3 encoder and audio adapter must stay frozen (train_parts, LoRA targets): "
                           "launch with recipes/accelerate/fsdp2.yaml or zero2.yaml to train them"])  # fmt: skip
    narrow = [
        f"{name} ({p.dtype})" for name, p in policy.named_parameters() if p.requires_grad and p.dtype != torch.float32
    ]
    if narrow:
        raise ConfigError([f"under DeepSpeed what trains must be float32, and {len(narrow)} parameters are not, e.g. "
                           f"{narrow[0]}: leave dtype at auto and use --mixed_precision bf16"])  # fmt: skip
    _config(accelerator)["gradient_clipping"] = float(limit)


def _config(accelerator: Any) -> dict[str, Any]:
    """What accelerate will hand to DeepSpeed."""
    return accelerator.state.deepspeed_plugin.deepspeed_config


# -- the update -------------------------------------------------------------------------------------------------------


def backward(engine: Any, loss: Tensor, *, last: bool) -> None:
    """Add a micro-batch's gradient. A loss that is not finite spoils it, so that DeepSpeed passes the step over."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))


def step(engine: Any) -> float:
    """Clip and update; the gradient's norm before clipping, inf where DeepSpeed found it not finite and did nothing."""
    engine.step()
    return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.inf


# -- the optimiser's state ---------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """This rank's part of a parameter: `length` elements of `flat` from `start`, the parameter's from `offset`."""

    flat: Tensor
    start: int
    length: int
    offset: int


def is_zero(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's optimiser over flat partitions."""
    return hasattr(optimizer, "refresh_fp32_params")


def parameter_groups(zero: Any) -> list[list[nn.Parameter]]:
    """The parameters of every group of the optimiser inside, whose own hold flat partitions (ZeRO-3: nothing)."""
    if not hasattr(zero, "sub_group_to_group_id"):
        return zero.bit16_groups
    parts: list[list[nn.Parameter]] = [[] for _ in zero.optimizer.param_groups]
    for number, parameters in enumerate(zero.fp16_groups):
        parts[zero.sub_group_to_group_id[number]] += parameters
    return parts


def gathered_state(zero: Any, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """`parameter/entry` of AdamW -> a collective that gathers it; every rank calls all of them, in this order."""
    inner = zero.optimizer.state
    for parameter in chain(*parameter_groups(zero)):
        entries = inner[_flats(zero)[0]]
        for entry, value in entries.items():
            read = (lambda p=parameter, e=entry: _gathered(zero, p, e)) if value.dim() else (lambda v=value: v)
            yield f"{names[parameter]}/{entry}", read


def load_state(zero: Any, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
    """Put whole entries into this rank's slices, and the weights as they are now into its float32 copy of them."""
    zero.refresh_fp32_params()
    if not state:  # saved before the first update
        return
    entries = next(iter(state.values()))
    fused = any(group.get("fused") for group in zero.optimizer.param_groups)  # then the counters are on the device too
    for flat in _flats(zero):
        zero.optimizer.state[flat] = {
            entry: torch.zeros_like(flat, requires_grad=False)
            if value.dim()
            else value.to(flat.device if fused else value.device, copy=True)
            for entry, value in entries.items()
        }
    for parameter, values in state.items():
        if (part := _slice(zero, parameter)) is not None:
            for entry, value in values.items():
                if value.dim():
                    piece = value.flatten()[part.offset : part.offset + part.length]  # the last rank's may be shorter
                    zero.optimizer.state[part.flat][entry][part.start : part.start + len(piece)] = piece


def _flats(zero: Any) -> list[Tensor]:
    return getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat


def _slice(zero: Any, parameter: Any) -> Slice | None:
    """None where other ranks hold all of the parameter."""
    if hasattr(parameter, "ds_id"):
        number, start, length = zero.grad_position[zero.get_param_id(parameter)]
        return Slice(_flats(zero)[number], start, length, length * dist.get_rank(parameter.ds_process_group))
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    ours, theirs = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Slice(_flats(zero)[mapping.param_group_index], ours.start, ours.numel, theirs.start)


def _gathered(zero: Any, parameter: Any, entry: str) -> Tensor:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    whole = torch.zeros(math.prod(shape), device=zero.device)
    if (part := _slice(zero, parameter)) is not None:
        place = whole[part.offset : part.offset + part.length]
        place.copy_(zero.optimizer.state[part.flat][entry][part.start : part.start + len(place)])
    dist.all_reduce(whole)
    return whole.view(shape)
