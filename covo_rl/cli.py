"""The `covo-rl` command: one word per room. Each sub-command is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covo_rl.data.terminal import say
from covo_rl.resolve import run_recipe
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors

if TYPE_CHECKING:
    from covo_rl.run.commands.completion import Words

#: word -> (module, attribute, one line of help). A typer app or a plain function taking the remaining words.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": ("covo_rl.cli", "train", "GRPO on audio questions"),
    "sft": ("covo_rl.cli", "sft", "teach a model by examples before GRPO"),
    "pretrain": ("covo_rl.cli", "pretrain", "teach a text model to hear and to speak"),
    "report": ("covo_rl.run.report.page", "app", "a run as one HTML page, with its sounds"),
    "watch": ("covo_rl.run.watch.command", "watch_command", "follow a run as it goes on"),
    "eval": ("covo_rl.evaluate.cli", "app", "score a model or replies on MMAU, MMAR, MMSU or own rows"),
    "generate": ("covo_rl.run.commands.generate", "generate_command", "ask a model one question about a sound"),
    "chat": ("covo_rl.run.commands.generate", "chat_command", "talk with a model about sounds"),
    "speech": ("covo_rl.speech.cli", "app", "speech to codes and back: encode, decode, train, demo"),
    "duplex": ("covo_rl.run.commands.duplex", "app", "a model that listens while it speaks"),
    "export": ("covo_rl.export.cli", "export_command", "a verified LoRA adapter or merged model from a run"),
    "serve-check": ("covo_rl.export.cli", "serve_check_command", "does an export take effect where it is served?"),
    "data": ("covo_rl.run.commands.data", "app", "check, profile and convert question sets"),
    "rewards": ("covo_rl.rewards.cli", "app", "list, try, check and score with reward functions"),
    "models": ("covo_rl.run.commands.models", "app", "families and models; whether they are exact"),
    "doctor": ("covo_rl.run.doctor", "app", "memory and time of a configuration, beforehand"),
    "rollout-server": ("covo_rl.run.commands.rollout_server", "app", "the vllm command of a run, and its check"),
    "bench": ("covo_rl.bench.cli", "app", "measure our step against the stock one"),
    "completion": ("covo_rl.cli", "completion_command", "a script that completes words in your shell"),
}
#: what belongs together -> word: an example
GROUPS: dict[str, dict[str, str]] = {
    "Train": {
        "train": "covo-rl train --data rows.json --audio-dir clips --model PATH",
        "sft": "covo-rl sft --model PATH --data rows.json --audio-dir clips",
        "pretrain": "covo-rl pretrain --config pretrain.yaml --stage 1",
    },
    "Look": {
        "report": "covo-rl report runs/tiny",
        "watch": "covo-rl watch runs/tiny --page --open",
        "eval": "covo-rl eval --set builtin --model PATH --output runs/eval",
    },
    "Use": {
        "generate": 'covo-rl generate --audio a.wav --question "How many beeps?"',
        "chat": "covo-rl chat --model builtin:tiny --audio a.wav",
        "speech": "covo-rl speech demo runs/speech",
        "duplex": "covo-rl duplex run --model PATH --audio a.wav --output out",
        "export": "covo-rl export runs/tiny --merged model",
        "serve-check": "covo-rl serve-check runs/tiny/adapter",
    },
    "Data and rewards": {
        "data": "covo-rl data check rows.json --audio-dir clips",
        "rewards": "covo-rl rewards check ./mine.py:score",
    },
    "Machine": {
        "models": "covo-rl models check builtin:tiny",
        "doctor": "covo-rl doctor --config recipes/configs/tiny.yaml",
        "rollout-server": "covo-rl rollout-server --config recipes/configs/tiny.yaml",
        "bench": "covo-rl bench grpo",
        "completion": "covo-rl --install-completion",
    },
}
#: commands that are recipes, which parse their own words
RECIPES = {"train": "grpo_mmau.py", "sft": "sft_cot.py", "pretrain": "pretrain.py"}


def usage() -> str:
    """The text of `covo-rl --help`."""
    lines = ["usage: covo-rl COMMAND [OPTIONS]   covo-rl COMMAND --help   covo-rl --version"]
    width = max(map(len, COMMANDS)) + 1
    for group, examples in GROUPS.items():
        lines += ["", group]
        for word, example in examples.items():
            lines += [f"  {word:<{width}}{COMMANDS[word][2]}", f"  {'':<{width}}$ {example}"]
    return "\n".join(lines)


def train(words: list[str]) -> None:
    """GRPO: the recipe, wherever the resolver finds it, as `python recipes/grpo_mmau.py` would."""
    run_recipe(RECIPES["train"], words)


def sft(words: list[str]) -> None:
    """Supervised stages before GRPO: the recipe, as `python recipes/sft_cot.py` would."""
    run_recipe(RECIPES["sft"], words)


def pretrain(words: list[str]) -> None:
    """Pre-training on speech and text: the recipe, as `python recipes/pretrain.py` would."""
    run_recipe(RECIPES["pretrain"], words)


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
    if words[0] == "--install-completion":
        words = ["completion", *words[1:], "--install"]
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        sys.exit(f"covo-rl: there is no command {words[0]!r}; {hint}the commands are {', '.join(COMMANDS)}")
    if words[0] in RECIPES:
        run_recipe(RECIPES[words[0]], words[1:])
        return
    command = command_app(words[0])
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


def command_app(word: str) -> Any:
    """The typer app of a command that is no recipe."""
    module, attribute, _ = COMMANDS[word]
    command = getattr(importlib.import_module(module), attribute)
    if isinstance(command, typer.Typer):
        return command
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    return app


# -- completion --------------------------------------------------------------------------------------------------------


def completion_command(
    shell: Annotated[str | None, typer.Argument(help="bash, zsh or fish; default: that of $SHELL")] = None,
    install: Annotated[bool, typer.Option("--install", help="write it where the shell looks for it")] = False,
) -> None:
    """Print the script that completes covo-rl in a shell, or install it."""
    from covo_rl.run.commands.completion import completion_script, install_completion, named_shell

    with user_errors("covo-rl completion"):
        shell = named_shell(shell)
        if install:
            path, then = install_completion(all_words(), shell)
            say(f"{path} is written; {then}")
        else:
            print(completion_script(shell, all_words()), end="")


def all_words() -> Words:
    """Words and options of all commands, read from their parsers; imports every command."""
    from typer.main import get_command

    from covo_rl.run.commands.completion import Words, recipe_words, words_of

    options = {"--help": None, "--version": None, "--install-completion": ("bash", "zsh", "fish")}
    words = Words(options=options)
    for name, (_, _, help) in COMMANDS.items():
        page = recipe_words(name, RECIPES[name]) if name in RECIPES else words_of(get_command(command_app(name)))
        words.commands[name] = replace(page, help=help)
    return words
