"""`covo-rl rollout-server`: the command that serves a run's rollouts with vLLM, and whether a running server is right.

covo-rl rollout-server --config run.yaml --host 10.0.0.7 > serve.sh
covo-rl rollout-server --config run.yaml --check http://10.0.0.7:8000

All other words are those of `covo-rl train`: what is served must be what is trained.
"""

from __future__ import annotations

from typing import Annotated

import typer

from covo_rl.data.terminal import say
from covo_rl.types import user_errors

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def rollout_server_command(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="address to listen on: one that only trainers reach")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="and its port")] = 8000,
    check: Annotated[str | None, typer.Option(metavar="URL", help="hold the server there to the run instead")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="the command for vLLM's CPU build, for tests")] = False,
) -> None:
    """Print the vllm command that serves a run's rollouts, or --check a server; other options are covo-rl train's."""
    from covo_rl.config import parse_options
    from covo_rl.run.defaults import with_defaults

    with user_errors("covo-rl rollout-server"):
        options = parse_options(with_defaults(context.args))
        from covo_rl.run import rollout_server  # after parsing, so that typos are answered at once

        if check is None:
            command = rollout_server.serve_command(options, host, port, cpu=cpu)
            for note in rollout_server.serve_notes(host):
                say(note, err=True)
            say(command)
            return
    with user_errors("covo-rl rollout-server", code=1):
        for line in rollout_server.check_server(options, check):
            say(line)
