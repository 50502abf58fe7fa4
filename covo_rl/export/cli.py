"""`covo-rl export` and `covo-rl serve-check`: plain functions, mounted by the top-level command."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from covo_rl.data.files import write_json
from covo_rl.data.terminal import say
from covo_rl.records.console import working
from covo_rl.types import user_errors


def export_command(
    source: Path = typer.Argument(..., help="run folder, checkpoint folder, or PEFT adapter folder"),
    adapter: Path | None = typer.Option(None, help="write a PEFT adapter here"),
    merged: Path | None = typer.Option(None, help="write merged weights under published names here"),
    dtype: str = typer.Option("auto", help="precision of what is written: auto, float32, bfloat16, float16"),
    base_model: str | None = typer.Option(None, help="base model, where the run or the adapter records none"),
    family: str | None = typer.Option(None, help="a family of your own: ./mine.py:Class, package.module:Class"),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="run the base model's code"),
    max_shard_gb: float | None = typer.Option(
        None, min=0.001, help="largest shard in GB (default: an eighth of the model, 4 GiB)"
    ),
    push_to_hub: str | None = typer.Option(None, metavar="OWNER/NAME", help="upload the one export that is written"),
    public: bool = typer.Option(False, help="create the repository for everyone; default: private"),
    published_base: str | None = typer.Option(
        None, metavar="OWNER/NAME", help="hub name of the base, recorded in place of a local folder"
    ),
    allow_noop: bool = typer.Option(False, help="export although the policy equals the base model"),
    replace: bool = typer.Option(False, help="replace an existing export"),
) -> None:
    """Write a LoRA adapter or merged weights, then check the logits in a fresh process."""
    folders = {kind: folder for kind, folder in (("adapter", adapter), ("merged", merged)) if folder is not None}
    if not folders:
        raise typer.BadParameter("nothing to write: give --adapter DIR, --merged DIR, or both")
    if push_to_hub and len(folders) == 2:
        raise typer.BadParameter("--push-to-hub takes one export: give --adapter or --merged")
    from covo_rl.export import ExportError
    from covo_rl.export.adapter import open_policy, portable_name
    from covo_rl.export.exporting import check_target, export_policy, torch_dtype
    from covo_rl.export.hub import check_hub, push
    from covo_rl.models import use_family

    with user_errors("covo-rl export", code=1):
        torch_dtype(dtype)
        use_family(family)
        if adapter == merged:
            raise ExportError(f"--adapter and --merged are both {adapter}: give two folders")
        for folder in folders.values():  # before the model is loaded
            check_target(folder, replace)
        repository = check_hub(push_to_hub) if push_to_hub else None
        opened = None
        for kind, folder in folders.items():  # the adapter of a 4-bit run is checked on that base, and merged into none
            if opened is None or opened.load_in_4bit:
                with working(f"loading the policy of {source}"):
                    opened = open_policy(
                        source, base_model=base_model, unquantised=kind == "merged",
                        trust_remote_code=trust_remote_code,
                    )  # fmt: skip
            base = published_base or portable_name(opened.base_model)
            if repository and base is None:
                raise ExportError(f"the base is a folder of this machine ({opened.base_model}), which means nothing to "
                                  "others: give --published-base OWNER/NAME")  # fmt: skip
            with working(f"{folder}: written, loaded in a fresh process, logits compared"):
                result = export_policy(
                    opened.modes, folder, kind=kind, run_folder=opened.run_folder, base_model=base, dtype=dtype,
                    max_shard_bytes=int(max_shard_gb * 1e9) if max_shard_gb else None, allow_noop=allow_noop,
                    replace=replace, wording=opened.wording, load_in_4bit=opened.load_in_4bit,
                )  # fmt: skip
            say(
                f"{folder}: verified in a fresh process on {len(result.prompts)} prompts ({result.dtype})\n"
                f"  max |logit - trained|  {result.max_abs_logit_diff_trained:.3g}  (tolerance {result.tolerance:.3g})"
                f"\n  max |logit - base|     {result.max_abs_logit_diff_base:.3g}\n"
                f"  update kept            {result.update_kept:.3f}"
            )
            if (other := result.unquantised) is not None:
                say(
                    "  checked on the 4-bit base that it was trained on; on the unquantised base, as information:\n"
                    f"  max |logit - trained|  {other['max_abs_logit_diff_trained']:.3g}  (between the bases alone "
                    f"{other['max_abs_logit_diff_of_bases']:.3g})\n  update kept            {other['update_kept']:.3f}"
                )
            elif opened.load_in_4bit:
                say(
                    "  merged into the unquantised base, and compared with the adapter on that: the run trained it on "
                    "a 4-bit base, so this is not exactly the policy that was trained; exported with --adapter, "
                    "verification.json says how far apart they are"
                )
            if repository is not None:
                say(f"pushed: {push(folder, repository, private=not public)}")


def serve_check_command(
    export: Path = typer.Argument(..., help="exported adapter or merged folder"),
    url: str | None = typer.Option(None, help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1"),
    model: str | None = typer.Option(None, help="name under which the endpoint serves the export"),
    base: str | None = typer.Option(None, help="name under which it serves the base model"),
    api_key: str | None = typer.Option(None, envvar="OPENAI_API_KEY", help="key of the endpoint"),
    timeout: float = typer.Option(120.0, min=0.1, help="seconds per request"),
    output: Path | None = typer.Option(None, help="write the report as JSON here"),
) -> None:
    """Does the export take effect where it is served? Without --url: in a fresh transformers process."""
    from covo_rl.export.serve_check import check_endpoint, check_local

    with user_errors("covo-rl serve-check", code=1):
        if url is None:
            report = check_local(export)
        elif model and base:
            report = check_endpoint(url, model=model, base=base, api_key=api_key, timeout=timeout)
        else:
            raise typer.BadParameter("--url needs --model and --base, the two names that the endpoint serves")
        say(json.dumps(report, indent=2))
        if output is not None:
            write_json(output, report)
    if not report["takes_effect"]:
        say("covo-rl serve-check: the served model answers as the base model does", err=True)
        raise typer.Exit(1)


app = typer.Typer(no_args_is_help=True, help="verified exports")
app.command("export")(export_command)
app.command("serve-check")(serve_check_command)
