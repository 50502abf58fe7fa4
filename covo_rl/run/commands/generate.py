"""`covo-rl generate` and `covo-rl chat`: what `load(...)` answers, at the terminal.

covo-rl generate --model builtin:tiny --audio a.wav --question "What is heard?" --choice rain --choice wind
covo-rl chat --model builtin:tiny --audio a.wav
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covo_rl.data.terminal import say
from covo_rl.resolve import ConfigError, meant
from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.run.python.chat import Chat
    from covo_rl.run.python.model import Model

ModelName = Annotated[str, typer.Option(help="checkpoint folder, hub name, or builtin:tiny")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")]
Audio = Annotated[list[Path] | None, typer.Option(help="sound file; several: one option each")]
Temperature = Annotated[float | None, typer.Option(min=1e-6, help="of sampling; without it the likeliest token")]
Length = Annotated[int, typer.Option(min=1, help="limit in tokens")]
Seed = Annotated[int, typer.Option(help="of sampling")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; found by itself")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run the checkpoint's code")]
Family = Annotated[str | None, typer.Option(help="a family of your own: ./mine.py:Class, package.module:Class")]
Instruction = Annotated[str | None, typer.Option(help="last line; default: the checkpoint's, else ours")]
COMMANDS = "/audio FILE adds a sound, /reset forgets everything, /quit ends"


def generate_command(
    question: Annotated[str, typer.Option(help="what is asked")],
    model: ModelName = "builtin:tiny",
    adapter: Adapter = None,
    audio: Audio = None,
    choice: Annotated[list[str] | None, typer.Option(help="an option to choose from; one option each")] = None,
    temperature: Temperature = None,
    num_generations: Annotated[int, typer.Option(min=1, help="replies; several need --temperature")] = 1,
    max_completion_length: Length = 1024,
    seed: Seed = 0,
    device: Device = None,
    instruction: Instruction = None,
    family: Family = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a reply: parts, tokens, log-probs")] = False,
) -> None:
    """Ask a model one question about a sound."""
    loaded = _loaded(
        audio, model, adapter=adapter, device=device, instruction=instruction, family=family,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    replies = loaded.generate(
        [question], audio=[list(audio or [])], choices=[choice or []], temperature=temperature,
        num_generations=num_generations, max_completion_length=max_completion_length, seed=seed,
    )  # fmt: skip
    for reply in replies if num_generations == 1 else replies[0]:
        say(json.dumps(asdict(reply)) if as_json else reply.text)
        if reply.problems and not as_json:
            say(f"note: {'; '.join(reply.problems)}", err=True)


def chat_command(
    model: ModelName = "builtin:tiny",
    adapter: Adapter = None,
    audio: Audio = None,
    temperature: Temperature = None,
    max_completion_length: Length = 1024,
    seed: Seed = 0,
    device: Device = None,
    instruction: Instruction = None,
    family: Family = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model about sounds; later questions see what was asked, heard and replied before."""
    loaded = _loaded(
        audio, model, adapter=adapter, device=device, instruction=instruction, family=family,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    options = {"temperature": temperature, "max_completion_length": max_completion_length, "seed": seed}
    conversation = loaded.chat(**options)
    say(f"{loaded!r}: ask about the sounds; {COMMANDS}", err=True)
    talk(conversation, _lines(), [*(audio or [])])


def _loaded(audio: list[Path] | None, model: str, **options: Any) -> Model:
    """The model, once every sound is there; `options` are those of `load`."""
    if absent := [f"--audio {path}: no such file{meant(path)}" for path in audio or () if not path.is_file()]:
        raise ConfigError(absent)
    from covo_rl.run.python.model import load

    return load(model, **options)


def talk(conversation: Chat, lines: Iterator[str], sounds: list[Any]) -> None:
    """Answer line by line; `sounds` go with the first question. What cannot be asked is said, and the talk goes on."""
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return
        if word == "/reset":
            conversation.reset()
            sounds = []
            say("forgotten: sounds, questions and replies", err=True)
        elif word == "/audio":
            path = Path(rest.strip())
            sounds += [path] if path.is_file() else []
            say(f"{path} goes with the next question" if path.is_file() else f"{path}: no such file", err=True)
        elif word.startswith("/"):
            say(f"there is no {word}; {COMMANDS}", err=True)
        elif word:
            try:
                say(conversation.ask(line.strip(), audio=list(sounds)).text)
                sounds = []
            except (UserError, OSError) as error:
                say(f"{error}", err=True)


def _lines() -> Iterator[str]:
    """What is typed, or piped in, until its end."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
