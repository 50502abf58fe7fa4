"""`covo-rl export` and `covo-rl serve-check`: plain functions, mounted by the top-level command."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def export_command(
    source: Path = typer.Argument(..., help="run folder, checkpoint folder, or PEFT adapter folder"),
    adapter: Path | None = typer.Option(None, help="write a PEFT adapter here"),
    merged: Path | None = typer.Option(None, help="write merged weights under published names here"),
    dtype: str = typer.Option("auto", help="precision of what is written: auto, float32, bfloat16, float16"),
    base_model: str | None = typer.Option(None, help="base model, where the run or the adapter records none"),
    max_shard_gb: float | None = typer.Option(
        None, help="largest shard in GB (default: an eighth of the model, 4 GiB)"
    ),
    allow_noop: bool = typer.Option(False, help="export although the policy equals the base model"),
    replace: bool = typer.Option(False, help="replace an existing export"),
) -> None:
    """Write a LoRA adapter or merged weights, then check the logits in a fresh process."""
    if adapter is None and merged is None:
        raise typer.BadParameter("nothing to write: give --adapter DIR, --merged DIR, or both")
    from covo_rl.export.errors import ExportError
    from covo_rl.export.exporting import export_adapter, export_merged
    from covo_rl.export.source import open_policy

    try:
        opened = open_policy(source, base_model=base_model)
        base = (
            None if opened.base_model.startswith("builtin:") or Path(opened.base_model).is_dir() else opened.base_model
        )
        common = {"run_folder": opened.run_folder, "base_model": base, "dtype": dtype, "allow_noop": allow_noop,
                  "replace": replace}  # fmt: skip
        if adapter is not None:
            _say(adapter, export_adapter(opened.modes, adapter, **common))
        if merged is not None:
            size = int(max_shard_gb * 1e9) if max_shard_gb else None
            _say(merged, export_merged(opened.modes, merged, max_shard_bytes=size, **common))
    except (ExportError, FileNotFoundError, ValueError) as error:
        typer.echo(f"covo-rl export: {error}", err=True)
        raise typer.Exit(1) from error


def _say(folder: Path, result) -> None:
    typer.echo(
        f"{folder}: verified in a fresh process on {len(result.prompts)} prompts with audio ({result.dtype})\n"
        f"  max |logit - trained|  {result.max_abs_logit_diff_trained:.3g}  (tolerance {result.tolerance:.3g})\n"
        f"  max |logit - base|     {result.max_abs_logit_diff_base:.3g}\n"
        f"  update kept            {result.update_kept:.3f}"
    )


def serve_check_command(
    export: Path = typer.Argument(..., help="exported adapter or merged folder"),
    url: str | None = typer.Option(None, help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1"),
    model: str | None = typer.Option(None, help="name under which the endpoint serves the export"),
    base: str | None = typer.Option(None, help="name under which it serves the base model"),
    api_key: str | None = typer.Option(None, envvar="OPENAI_API_KEY", help="key of the endpoint"),
    timeout: float = typer.Option(120.0, help="seconds per request"),
    output: Path | None = typer.Option(None, help="write the report as JSON here"),
) -> None:
    """Does the export take effect where it is served? Without --url: in a fresh transformers process."""
    from covo_rl.export.errors import ExportError
    from covo_rl.export.serve_check import check_endpoint, check_local

    try:
        if url is None:
            report = check_local(export)
        elif model and base:
            report = check_endpoint(url, model=model, base=base, api_key=api_key, timeout=timeout)
        else:
            raise typer.BadParameter("--url needs --model and --base, the two names that the endpoint serves")
    except ExportError as error:
        typer.echo(f"covo-rl serve-check: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(report, indent=2))
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not report["takes_effect"]:
        typer.echo("covo-rl serve-check: the served model answers as the base model does", err=True)
        raise typer.Exit(1)


app = typer.Typer(no_args_is_help=True, help="verified exports")
app.command("export")(export_command)
app.command("serve-check")(serve_check_command)

if __name__ == "__main__":
    app()
