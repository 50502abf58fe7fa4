"""Joining the processes that a launcher started, on GPUs or on CPUs.

accelerate puts CPU processes together only when told to; otherwise each believes to be the only one, and all write the
same run folder. It also leaves FSDP2 and DeepSpeed off on CPUs, where both work over gloo; here they are on, so that a
launch configuration can be tried without GPUs.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from covo_rl.config import ConfigError
from covo_rl.policy.products import HALF, keep_angles_exact
from covo_rl.train.zero import require_deepspeed, settle

#: rank 0 verifies an export alone while the others wait; a rank that dies is noticed by the launcher, not by this
PATIENCE = timedelta(hours=1)


def launched_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpus() -> bool:
    """Whether several processes run where there is no device that they could share out."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return launched_processes() > 1 and (device is None or device.type == "mps")


def _check_devices() -> None:
    """Raises ConfigError where processes would fight over a device: CUDA's own words are "invalid device ordinal"."""
    # one started by hand or by srun may only know its own place, which is below the number of devices
    place = int(os.environ.get("LOCAL_RANK", launched_processes() - 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))
    if local > 1 and not on_cpus() and local > (count := torch.accelerator.device_count()):
        raise ConfigError([f"{local} processes were started on a machine with {count} device(s): start as many as it "
                           "has, or hide them (CUDA_VISIBLE_DEVICES=) to try the launch out on CPUs"])  # fmt: skip


def process_state() -> PartialState:
    """This process among all that were launched, for work that needs no optimiser.

    Raises:
        ConfigError: the launcher started more processes than accelerate sees, or than there are devices.
    """
    _check_devices()
    return _complete(PartialState(cpu=on_cpus()))


def check_precision() -> None:
    """Raises ConfigError for a mixed precision of the launcher that cannot train."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):  # accelerate takes any word, and then computes in float32
        why = "in float16 gradients vanish" if precision == "fp16" else "there are no and bf16"
        raise ConfigError([f"mixed_precision {precision!r} of the launcher: {why}; use bf16 or no"])


def computes_in_16_bits(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Whether a run autocasts, or holds weights in 16 bits."""
    return accelerator.mixed_precision != "no" or any(p.dtype in HALF for p in model.parameters())


def allow_tf32(device: torch.device, allowed: bool, model: torch.nn.Module) -> None:
    """On CUDA, float32 products round their operands to 10 bits (TF32) where `allowed`, but never positions of `model`.

    A run in float32 promises rollouts that equal scoring to 1e-5; one in 16 bits has coarser numbers already.
    """
    if device.type == "cuda":
        # not backends.cuda.matmul.fp32_precision: after it torch 2.11's compiler refuses to read this setting
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        if allowed:
            keep_angles_exact(model)


def join() -> Accelerator:
    """The accelerator of a training run.

    Raises:
        ConfigError: the launcher started more processes than accelerate sees, or asks for what would be done wrongly.
    """
    check_precision()
    _check_devices()
    if zero := _asked_for("DEEPSPEED"):
        require_deepspeed()
    mesh = _mesh_sizes()
    if mesh and on_cpus():  # accelerate would refuse it there, as it leaves FSDP2 off
        del os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"]
    accelerator = _complete(
        Accelerator(
            cpu=on_cpus(),
            mixed_precision="no" if zero else None,  # DeepSpeed's own 16 bits are not ours, see zero.py
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    )
    state = accelerator.state
    if (steps := accelerator.gradient_accumulation_steps) != 1:  # accelerate would divide every loss by it
        raise ConfigError([f"gradient_accumulation_steps {steps} of the launcher: set it to 1; micro_batch_prompts "
                           "splits an update's groups over passes, with the same gradient"])  # fmt: skip
    if zero:
        settle(accelerator, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if _asked_for("FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()  # from the launcher's environment
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP  # which accelerate copies to `state` again and again
        if mesh:
            state.parallelism_config, state.device_mesh = mesh, mesh.get_device_mesh("cpu")
    return accelerator


def device_of(name: str | None = None) -> torch.device:
    """`cpu`, `cuda`, `cuda:1` ...; None and `auto`: what this process was given.

    Raises:
        ConfigError: this machine, or this build of torch, has no such device.
    """
    if name in (None, "auto"):
        own: Any = PartialState().device
        return own
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError([f"device {name!r}: write auto, cpu, cuda, cuda:1 or mps"]) from error
    backend = getattr(torch, device.type, None)
    count = backend.device_count() if device.type != "cpu" and backend and backend.is_available() else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        has = f"{count or 'no'} {device.type} device(s) that torch {torch.__version__} can use"
        raise ConfigError([f"device {name}: this machine has {has}; leave the option out, or write cpu"])
    return device


def _asked_for(kind: str) -> bool:
    """What the launcher says of `FSDP` or `DEEPSPEED`."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _mesh_sizes() -> ParallelismConfig | None:
    """HSDP: over how many ranks parameters are sharded, and how many copies there are; None where nobody asks."""
    if not _asked_for("PARALLELISM_CONFIG"):
        return None
    sizes = ParallelismConfig()  # from the launcher's environment
    copies, shards, wanted = sizes.dp_replicate_size, sizes.dp_shard_size, sizes.data_parallel_size
    if sizes.non_data_parallel_size > 1:
        raise ConfigError(["tensor, context and sequence parallelism of the launcher: this trainer has none of them; "
                           "parallelism_config has dp_replicate_size and dp_shard_size, nothing else"])  # fmt: skip
    if wanted != (ranks := launched_processes()) or shards == 1:
        raise ConfigError([f"{copies} copies over {shards} shards each are {wanted} ranks, and {ranks} were started: "
                           "set parallelism_config_dp_replicate_size to the number of machines and "
                           "parallelism_config_dp_shard_size to the GPUs of each, 2 or more"])  # fmt: skip
    return sizes


def _complete(state: Any) -> Any:
    """`state`, if it sees every process that was launched."""
    if state.num_processes != launched_processes():
        raise ConfigError(
            [f"{launched_processes()} processes were started but each sees {state.num_processes}: they would all write "
             "the same run folder. Use torchrun or accelerate launch, with as many devices as processes"]
        )  # fmt: skip
    return state
