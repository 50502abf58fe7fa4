"""The `covo-rl` command: one word per room. Each sub-command is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys

from covo_rl.data.terminal import say
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors

#: word -> (module, attribute, one line of help). A typer app or a plain function taking the remaining words.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": ("covo_rl.cli", "train", "GRPO on audio questions: runs recipes/grpo_mmau.py"),
    "eval": (
        "covo_rl.evaluate.cli",
        "app",
        "score a model or predictions on MMAU, MMAR, MMSU, built-in set",
    ),
    "generate": ("covo_rl.run.generate", "generate_command", "ask a model one question about a sound"),
    "chat": ("covo_rl.run.generate", "chat_command", "talk with a model about sounds"),
    "export": ("covo_rl.export.cli", "export_command", "write a verified LoRA adapter or merged model from a run"),
    "serve-check": ("covo_rl.export.cli", "serve_check_command", "does an exported adapter take effect when served?"),
    "rewards": ("covo_rl.rewards.cli", "app", "list, try, check and score with reward functions"),
    "data": ("covo_rl.run.data_commands", "app", "check, profile and convert question sets"),
    "report": ("covo_rl.run.report.page", "app", "one HTML page from a run folder"),
    "doctor": ("covo_rl.run.doctor", "app", "estimate memory and time of a configuration"),
    "bench": ("covo_rl.bench.cli", "app", "measure our step against the stock one"),
}


def usage() -> str:
    """The text of `covo-rl --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {word:<{width}}  {help}" for word, (_, _, help) in COMMANDS.items()]
    return "usage: covo-rl COMMAND [OPTIONS]   (covo-rl COMMAND --help)\n\n" + "\n".join(lines)


def train(words: list[str]) -> None:
    """Run the recipe, wherever the resolver finds it, as `python recipes/grpo_mmau.py` would."""
    import runpy

    from covo_rl.resolve import find

    recipe = str(find("recipes", "grpo_mmau.py"))
    sys.argv = [recipe, *words]
    runpy.run_path(recipe, run_name="__main__")


def console_script() -> None:
    """Entry point: `main`, as one of several ranks where a launcher started it."""
    exit_after(main)


def main(words: list[str] | None = None) -> None:
    """Run the command that the words name."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] in ("-V", "--version"):
        from covo_rl import __version__

        print(f"covo-rl {__version__}")
        return
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        sys.exit(f"covo-rl: there is no command {words[0]!r}; {hint}the commands are {', '.join(COMMANDS)}")
    module, attribute, _ = COMMANDS[words[0]]
    command = getattr(importlib.import_module(module), attribute)
    if command is train:
        train(words[1:])
        return
    import typer

    if not isinstance(command, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command()(command)
        command = app
    with user_errors(f"covo-rl {words[0]}"):
        try:
            code = command(args=words[1:], prog_name=f"covo-rl {words[0]}", standalone_mode=False)
        except typer.Abort:
            sys.exit(1)
        except Exception as error:  # typer's own for words that make no sense: their base class is private
            if not hasattr(error, "format_message"):
                raise
            say(f"{error.format_message()}\nsee covo-rl {words[0]} --help", err=True)  # pyright: ignore
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)
