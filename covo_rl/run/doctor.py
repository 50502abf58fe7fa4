"""`covo-rl doctor --config FILE`: memory and time of a configuration, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from covo_rl.run.planner import MIB, Plan, Speed, audio_positions, measure_speed, plan

if TYPE_CHECKING:
    from covo_rl.config import Options

app = typer.Typer(add_completion=False)


def plan_options(
    options: Options, *, seconds: float = 30.0, text_positions: int = 100, speed: Speed | None = None
) -> Plan:
    """The plan of a run's options, on one rank, for clips of `seconds` and questions of `text_positions` tokens."""
    from transformers import AutoConfig

    import covo_rl.models.covo_audio  # noqa: F401  (registers its configuration)
    from covo_rl.resolve import resolve_model

    config = AutoConfig.from_pretrained(resolve_model(options.model.model))
    dtype = options.model.dtype
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return plan(
        config,
        prompts=options.train.prompts_per_step,
        generations=options.rollout.num_generations,
        prompt_positions=audio_positions(config, seconds) + text_positions,
        completion=options.rollout.max_completion_length,
        micro_batch_prompts=options.train.micro_batch_prompts,
        micro_batch_rollouts=options.train.micro_batch_rollouts,
        lora=options.adapter.lora,
        lora_r=options.adapter.lora_r,
        train_parts=tuple(options.adapter.train_parts),
        dtype=dtype,
        gradient_checkpointing=options.train.gradient_checkpointing,
        reference=bool(options.loss.beta),
        updates=options.train.num_iterations,
        speed=speed,
    )


@app.command()
def doctor(
    config: Annotated[Path, typer.Option(help="YAML of a run")],
    seconds: Annotated[float, typer.Option(help="length of a typical clip")] = 30.0,
    text_positions: Annotated[int, typer.Option(help="tokens of a typical question with its template")] = 100,
    completion: Annotated[int | None, typer.Option(help="typical completion; default: the limit")] = None,
    ranks: Annotated[int, typer.Option(help="processes that share prompts_per_step")] = 1,
    device: Annotated[str, typer.Option(help="whose speed is measured: auto, cpu, cuda")] = "auto",
) -> None:
    """Estimate memory and time of a configuration."""
    from covo_rl.config import ConfigError, parse_options

    try:
        options = parse_options(["--config", str(config)])
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    options.train.prompts_per_step = max(1, options.train.prompts_per_step // ranks)
    if completion is not None:
        options.rollout.max_completion_length = completion
    made = plan_options(options, seconds=seconds, text_positions=text_positions, speed=measure_speed(device))
    typer.echo(render_plan(made))


def render_plan(made: Plan) -> str:
    """The plan as text."""
    lines = [f"trainable parameters {made.trainable:,}", "memory on one rank, MiB"]
    for title, part in (("", made.memory), ("sampling: ", made.sampling), ("loss: ", made.loss)):
        lines += [f"  {title + name:<36}{value / MIB:>12,.0f}" for name, value in part.items() if value]
    lines.append(f"  {'peak, with 10 % for fragmentation':<36}{made.peak / MIB:>12,.0f}")
    lines.append("positions per step: " + ", ".join(f"{name} {count:,}" for name, count in made.positions.items()))
    if made.seconds:
        lines.append("seconds per step, at this machine's measured speed")
        lines += [f"  {name:<36}{value:>12.2f}" for name, value in made.seconds.items() if value]
        lines.append(f"  {'step':<36}{made.step_seconds:>12.2f}")
    return "\n".join([*lines, *(f"note: {note}" for note in made.notes)])


if __name__ == "__main__":
    app()
