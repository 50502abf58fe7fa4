"""`covo-rl doctor --config FILE`: memory and time of a configuration, before any weight is loaded.

Parameters are counted exactly (the model is built without storage). Activations are estimated from what the decoder
layers save for the backward pass, per position:

    10 D + 4 I + 2 K       D width, I width of the MLP, K width of keys and values (norms, attention, gated MLP)
     6 D + 2 K             gradient_checkpointing
         D                 gradient_checkpointing with recompute layer

and of one layer the first sum while it is recomputed, which a test compares with what a real pass saves. Every figure
is for one rank without sharding.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covo_rl.data.terminal import say
from covo_rl.run.sizes import Shape, audio_positions, shape_of, sizes_of
from covo_rl.run.speed import DECODE_FACTOR, MIB, Speed, gpu_memory, measure_speed, step_seconds
from covo_rl.run.vllm_memory import vllm_memory
from covo_rl.types import user_errors

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.config import Options
    from covo_rl.types import Example

#: room for allocator fragmentation, libraries and the CUDA context
OVERHEAD = 1.1
BYTES = {"float32": 4, "bfloat16": 2}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class SpeechPart(Enum):
    tokenizer = "tokenizer"
    decoder = "decoder"


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank by what holds them, and seconds of one step by phase.

    `memory` has the steady part (weights, gradients and optimiser, reference), `sampling` and `loss` what each phase
    adds at its peak; `peak` is steady plus the larger of them, with 10 % for fragmentation.
    """

    memory: dict[str, float]
    sampling: dict[str, float]
    loss: dict[str, float]
    seconds: dict[str, float]
    positions: dict[str, int]
    trainable: int
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        """Bytes."""
        return OVERHEAD * (sum(self.memory.values()) + max(sum(self.sampling.values()), sum(self.loss.values())))


def plan(
    model_config: Any, options: Options, *, prompt_positions: int, speed: Speed | None = None,
    gpu_bytes: float | None = None,
) -> Plan:  # fmt: skip
    """Estimate one step on one rank; `prompt_positions` includes the audio, completions have their full length.

    Without `speed` there are no seconds. `gpu_bytes`: all memory of the GPU, of which a colocated vLLM takes a share.
    """
    from covo_rl.models.quantised import BYTES_IN_4BIT
    from covo_rl.policy import Policy
    from covo_rl.policy.head import chunk_elements

    train, adapter, rollout = options.train, options.adapter, options.rollout
    shape, dtype = shape_of(model_config, adapter), weights_dtype(model_config, options)
    size = BYTES[dtype]
    quantised = shape.linear_parameters if adapter.load_in_4bit else 0
    trainable = shape.trainable
    train_size = 4 if adapter.lora else size
    prompts, completion = train.prompts_per_step, rollout.max_completion_length
    rows, micro_prompts = prompts * rollout.num_generations, min(train.micro_batch_prompts, prompts)
    together = min(rows, rollout.decode_rows)
    micro_rows = micro_prompts * min(train.micro_batch_rollouts or rollout.num_generations, rollout.num_generations)
    micro = shape.copies(micro_prompts, micro_rows) * prompt_positions + micro_rows * completion
    memory = {
        "weights": (shape.total - quantised) * size + quantised * BYTES_IN_4BIT + trainable * 4 * adapter.lora,
        "gradients": trainable * train_size,
        "optimiser (AdamW)": 2 * trainable * train_size,
        "reference copy": trainable * size if options.loss.beta and not adapter.lora else 0.0,
    }
    key_values = 2 * shape.layers * shape.kv_width * size
    limit_mb = inspect.signature(Policy).parameters["decode_weights_mb"].default
    folds = dtype == "float32" and shape.linear_parameters * 4 <= limit_mb * MIB
    sampling = {
        # packed as the prefill left them, and padded as the decoding reads them
        "prompt keys": 2 * shape.copies(prompts, together) * prompt_positions * key_values,
        "completion keys": together * completion * key_values,
        "logits and probabilities": 3 * together * shape.vocabulary * 4,
        "decoding weights": shape.linear_parameters * 4 if folds else 0.0,
    }
    engine, elsewhere = options.engine, []
    if engine.use_vllm:
        size_of = {"prompt_positions": prompt_positions, "size": size, "gpu_bytes": gpu_bytes}
        sampling, elsewhere = vllm_memory(shape, options, **size_of)
        if not engine.vllm_enable_sleep_mode:
            memory, sampling = {**memory, **sampling}, {}
    chunk = min(max(chunk_elements(), 16 * shape.vocabulary), micro_rows * completion * shape.vocabulary)
    head_trains = not adapter.lora and "lm_head" in adapter.train_parts
    loss = {
        "activations": activation_bytes(
            shape, micro, size, recompute=train.recompute if train.gradient_checkpointing else None
        ),
        "head": micro_rows * completion * shape.width * size + (4 if head_trains else 1) * 4.0 * chunk,
        "head gradient in use": shape.parameters.get("lm_head", 0) * 4.0 if head_trains else 0.0,
    }
    seconds = step_seconds(shape, options, prompt_positions, size, speed) if speed else {}
    crowded = not train.gradient_checkpointing and loss["activations"] > 2 * shape.total * size
    note = "activations outweigh the weights: gradient_checkpointing or a smaller micro_batch_prompts helps"
    notes = (*elsewhere, *((note,) if crowded else ()), *((_rates(speed, dtype),) if speed else ()))
    if speed and shape.expert_parameters:
        notes += ("the seconds leave the products and the reading of the experts out",)
    positions = {"prompts": prompts * prompt_positions, "completions": rows * completion, "micro-batch": micro}
    return Plan(memory, sampling, loss, seconds, positions, trainable, notes)


def _rates(speed: Speed, dtype: str) -> str:
    return (f"the seconds are a lower bound: products at {speed.flops / 1e12:,.4g} TFLOP/s in {dtype}, copies at "
            f"{speed.bandwidth / 1e9:,.4g} GB/s, both measured here; a decode step counts {DECODE_FACTOR} times the "
            "reading of weights and keys")  # fmt: skip


def weights_dtype(model_config: Any, options: Options) -> str:
    """What the run's weights will be in, with `auto` resolved."""
    from covo_rl.policy.trainable import auto_dtype

    if options.model.dtype != "auto":
        return options.model.dtype
    own = str(getattr(model_config, "dtype", None) or "float32").removeprefix("torch.")
    return auto_dtype(own, full=not options.adapter.lora) or own


def layer_values(shape: Shape, recompute: str | None = None) -> int:
    """What a decoder layer saves for the backward pass, in values per position."""
    attention = 6 * shape.width + 2 * shape.kv_width
    return {None: attention + 4 * (shape.width + shape.mlp_width), "mlp": attention, "layer": shape.width}[recompute]


def activation_bytes(shape: Shape, positions: int, size: int, *, recompute: str | None = None) -> float:
    """What the decoder saves over `positions` packed positions, and one layer while that is recomputed."""
    again = 0 if recompute is None else layer_values(shape)
    return float(positions * size * (shape.layers * layer_values(shape, recompute) + again))


def plan_options(
    options: Options, *, seconds: float = 30.0, text_positions: int = 100, speed: Speed | None = None,
    gpu_bytes: float | None = None,
) -> Plan:  # fmt: skip
    """The plan of a run's options, on one rank, for clips of `seconds` and questions of `text_positions` tokens."""
    config = sizes_of(options.model.model)
    positions = audio_positions(config, seconds) + text_positions
    return plan(config, options, prompt_positions=positions, speed=speed, gpu_bytes=gpu_bytes)


@app.command()
def doctor(
    config: Annotated[Path, typer.Option(help="YAML of a run")],
    seconds: Annotated[float, typer.Option(min=0.01, help="length of a typical clip")] = 30.0,
    text_positions: Annotated[int, typer.Option(min=0, help="tokens of a typical question with its template")] = 100,
    completion: Annotated[int | None, typer.Option(min=1, help="typical completion; default: the limit")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes that share prompts_per_step")] = 1,
    device: Annotated[str, typer.Option(help="whose speed is measured: auto, cpu, cuda")] = "auto",
    gpu_gb: Annotated[float | None, typer.Option(min=0.1, help="GPU that vLLM shares; default: the device")] = None,
    speech: Annotated[SpeechPart | None, typer.Option(help="the YAML trains a part of speech out")] = None,
) -> None:
    """Estimate memory and time of a configuration."""
    from covo_rl.config import parse_options
    from covo_rl.models import use_family

    with user_errors("covo-rl doctor"):
        if speech is not None:
            from covo_rl.run.speech_memory import speech_plan

            return say(render_plan(speech_plan(speech.value, config, seconds, device)))
        options = parse_options(["--config", str(config)])
        use_family(options.model.family)
        options.train.prompts_per_step = max(1, options.train.prompts_per_step // ranks)
        if completion is not None:
            options.rollout.max_completion_length = completion
        speed = measure_speed(device, weights_dtype(sizes_of(options.model.model), options))
        gpu_bytes = gpu_memory(device) if gpu_gb is None else gpu_gb * 1e9
        size = {"seconds": seconds, "text_positions": text_positions, "gpu_bytes": gpu_bytes}
        estimate = plan_options(options, **size, speed=speed)
    say(render_plan(estimate))


def budget(options: Options, rows: Sequence[Example], clips: ClipStore) -> str:
    """`render_plan` for a run whose clips are as long as the longest of these rows."""
    waveforms = [clips.waveform(clips.key(row.clips[0])) for row in rows if row.clips]
    seconds = max((len(w) / rate for w, rate in waveforms), default=0.0)
    return render_plan(plan_options(options, seconds=seconds, gpu_bytes=gpu_memory("auto")))


def render_plan(estimate: Plan) -> str:
    """The plan as text."""
    lines = [f"trainable parameters {estimate.trainable:,}", "memory on one rank, MiB"]
    for title, part in (("", estimate.memory), ("sampling: ", estimate.sampling), ("loss: ", estimate.loss)):
        lines += [f"  {title + name:<36}{value / MIB:>12,.0f}" for name, value in part.items() if value]
    lines.append(f"  {'peak, with 10 % for fragmentation':<36}{estimate.peak / MIB:>12,.0f}")
    lines.append("positions per step: " + ", ".join(f"{name} {count:,}" for name, count in estimate.positions.items()))
    if estimate.seconds:
        lines.append("seconds per step, at least, at this machine's measured speed")
        lines += [f"  {name:<36}{value:>12.2f}" for name, value in estimate.seconds.items() if value]
        lines.append(f"  {'step':<36}{sum(estimate.seconds.values()):>12.2f}")
    return "\n".join([*lines, *(f"note: {note}" for note in estimate.notes)])


if __name__ == "__main__":
    app()
