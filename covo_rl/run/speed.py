"""How fast this machine is, measured in a second: products in a dtype, and copies; and what a step takes at that."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from covo_rl.config import Options
    from covo_rl.run.sizes import Shape

MIB = 2**20
#: a decode step over the time that reading its weights and keys takes, as measured on an H200 (docs/performance.md)
DECODE_FACTOR = 2.0


class Speed(NamedTuple):
    """What the device does: operations of products per second, and bytes per second, read and written together by a
    copy: in use rather than on paper."""

    flops: float
    bandwidth: float


def measure_speed(device: str = "auto", dtype: str = "float32") -> Speed:
    """A quick measurement of this machine: square products in `dtype`, copies of more than its caches hold."""
    import torch

    from covo_rl.train.launch import device_of

    chosen = device_of(device)
    gpu = chosen.type != "cpu"
    n, elements, calls = (8192, 512 * MIB, 10) if gpu else (768, 32 * MIB, 1)
    square = torch.randn(n, n, device=chosen).to(getattr(torch, dtype))
    source = torch.zeros(elements, device=chosen, dtype=torch.float16)
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * source.element_size()

    def rate(work: float, function: Callable[[], Any]) -> float:
        """Several calls between two waits for the device, which take longer than a call; the best of three."""

        def seconds() -> float:
            device_drained(chosen)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            device_drained(chosen)
            return time.perf_counter() - start

        return calls * work / min([seconds() for _ in range(4)][1:])  # the first warms up

    return Speed(rate(2.0 * n**3, lambda: square @ square), rate(moved, lambda: target.copy_(source)))


def device_drained(device: Any) -> None:
    """Return when the device has done everything that was asked of it; a CPU has."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def gpu_memory(device: str = "auto") -> float | None:
    """Bytes of a CUDA device, None of others."""
    import torch

    from covo_rl.train.launch import device_of

    chosen = device_of(device)
    return float(torch.cuda.get_device_properties(chosen).total_memory) if chosen.type == "cuda" else None


def step_seconds(shape: Shape, options: Options, prompt: int, size: int, speed: Speed) -> dict[str, float]:
    """Of a step by phase: products over the device's rate; a decode step waits for the reading of weights and keys.

    Servers sample elsewhere.
    """
    prompts, completion = options.train.prompts_per_step, options.rollout.max_completion_length
    rows, updates = prompts * options.rollout.num_generations, options.train.num_iterations

    def forward(queries: float, pairs: float) -> float:
        return 2.0 * shape.linear_parameters * queries + 4.0 * shape.layers * shape.width * pairs

    encoder = shape.parameters.get("encoder", 0) + shape.parameters.get("audio_adapter", 0)
    prefill = forward(prompts * prompt, prompts * prompt**2 / 2)
    decode = forward(rows * completion, rows * (completion * prompt + completion**2 / 2))
    decode += rows * completion * 2.0 * shape.width * shape.vocabulary
    copies = shape.copies(prompts, rows)
    one_pass = (forward(copies * prompt, copies * prompt**2 / 2) + decode) / speed.flops
    together = min(rows, options.rollout.decode_rows)
    read = decode_bytes(shape, prompt_positions=prompts * prompt, rows=together, completion=completion, size=size)
    steps = completion * rows / together
    again = 4 / 3 if options.train.gradient_checkpointing else 1.0
    here = not (options.engine.use_vllm and options.engine.vllm_mode == "server")
    return {
        "encode": prompts * 2.0 * encoder * 1500 / speed.flops,  # 1500 positions in 30 s
        "prefill": here * prefill / speed.flops,
        "decode": here * max(decode / speed.flops, DECODE_FACTOR * steps * read / speed.bandwidth),
        "old": one_pass if options.engine.use_vllm or (updates > 1 and size < 4) else 0.0,
        "reference": one_pass if options.loss.beta else 0.0,
        "loss": updates * 2.2 * one_pass * again,
    }


def decode_bytes(shape: Shape, *, prompt_positions: int, rows: int, completion: int, size: int) -> float:
    """Bytes that one decode step reads at the least, a mean over the steps: the weights of decoder and head, keys and
    values of every prompt (`prompt_positions` in all) once, and the rows' own; `size` bytes per value.
    """
    keys = 2 * shape.layers * shape.kv_width * (prompt_positions + rows * completion / 2)
    return size * (shape.linear_parameters + shape.width * shape.vocabulary + keys)
