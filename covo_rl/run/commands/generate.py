"""`covo-rl generate` and `covo-rl chat`: what `load(...)` answers, at the terminal.

covo-rl generate --model builtin:tiny --audio a.wav --question "What is heard?" --choice rain --choice wind
covo-rl chat --model builtin:tiny --audio a.wav
covo-rl chat --audio question.wav --speak reply.wav
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covo_rl.data.terminal import say
from covo_rl.resolve import BUILTIN, ConfigError, meant
from covo_rl.speech import SHIPPED_DECODER
from covo_rl.speech.grid import RATE
from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.run.python.chat import Chat
    from covo_rl.run.python.model import Model, Reply

ModelName = Annotated[str, typer.Option(help="checkpoint folder, hub name, or builtin:tiny")]
ChatModel = Annotated[
    str | None, typer.Option(help="folder or hub name; default builtin:tiny, with --speak builtin:tiny_spoken")
]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")]
Audio = Annotated[list[Path] | None, typer.Option(help="sound file; several: one option each")]
Temperature = Annotated[float | None, typer.Option(min=1e-6, help="of sampling; without it the likeliest token")]
Length = Annotated[int, typer.Option(min=1, help="limit in tokens")]
Seed = Annotated[int, typer.Option(help="of sampling")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; found by itself")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run the checkpoint's code")]
Family = Annotated[str | None, typer.Option(help="a family of your own: ./mine.py:Class, package.module:Class")]
Instruction = Annotated[str | None, typer.Option(help="last line; default: the checkpoint's, else ours")]
Speak = Annotated[Path | None, typer.Option(help="answer aloud: wav file of the first reply; later ones get a number")]
Decoder = Annotated[str | None, typer.Option(help="with --speak: decoder folder; default: the shipped one")]
VoiceName = Annotated[Path | None, typer.Option("--voice", help="with --speak: a recording, or folder of a prompt")]
Speaker = Annotated[str | None, typer.Option(help="with --speak: who replies, a name that the model was trained with")]
Emotion = Annotated[
    str | None, typer.Option(help="with --speak: joy, anger, sadness, fear, disgust, depression, surprise")
]
Pattern = Annotated[str | None, typer.Option(help="with --speak: blocks of text ids and codes, such as 5:15")]
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
        say(json.dumps(_parts(reply)) if as_json else reply.text)
        if reply.problems and not as_json:
            say(f"note: {'; '.join(reply.problems)}", err=True)


def _parts(reply: Reply) -> dict[str, Any]:
    return {name: value for name, value in asdict(reply).items() if name != "wave"}


def chat_command(
    model: ChatModel = None,
    adapter: Adapter = None,
    audio: Audio = None,
    temperature: Temperature = None,
    max_completion_length: Length = 1024,
    seed: Seed = 0,
    device: Device = None,
    instruction: Instruction = None,
    family: Family = None,
    trust_remote_code: TrustRemoteCode = False,
    speak: Speak = None,
    decoder: Decoder = None,
    voice: VoiceName = None,
    pattern: Pattern = None,
    speaker: Speaker = None,
    emotion: Emotion = None,
) -> None:
    """Talk with a model about sounds; later questions see what was asked, heard and replied before.

    With --speak replies are heard, and a sound may be the whole question: an empty line, or the end, asks it.
    """
    persona = {"speaker": speaker, "emotion": emotion}
    if problems := _speech_problems(speak, decoder, voice, pattern, persona):
        raise ConfigError(problems)
    loaded = _loaded(
        audio, model or ("builtin:tiny_spoken" if speak else "builtin:tiny"), adapter=adapter, device=device,
        instruction=instruction, family=family, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    options = {"temperature": temperature, "max_completion_length": max_completion_length, "seed": seed}
    spoken = {"speak": decoder or SHIPPED_DECODER, "voice": voice, "pattern": pattern, **persona} if speak else {}
    conversation = loaded.chat(**spoken, **options)
    alone = ", an empty line asks them without words" if speak else ""
    say(f"{loaded!r}: ask about the sounds{alone}; {COMMANDS}", err=True)
    talk(conversation, _lines(), [*(audio or [])], speak)


def _speech_problems(
    speak: Path | None, decoder: str | None, voice: Path | None, pattern: str | None, persona: dict[str, str | None]
) -> list[str]:
    """What is wrong with these options, before a model is loaded."""
    if speak is None:
        options = {"--decoder": decoder, "--voice": voice, "--pattern": pattern}
        options |= {f"--{name}": value for name, value in persona.items()}
        return [f"{name} needs --speak FILE" for name, value in options.items() if value is not None]
    from covo_rl.run.python.spoken import speech_problems

    rules = (
        (speak.suffix.lower() != ".wav", f"--speak {speak}: replies are wav files; name one, such as reply.wav"),
        (speak.exists(), f"--speak {speak} exists: remove it, or name another file"),
        (not speak.parent.is_dir(), f"--speak {speak}: there is no folder {speak.parent}"),
        (decoder is not None and not decoder.startswith(BUILTIN) and not Path(decoder).is_dir(),
         f"--decoder {decoder}: no such folder{meant(Path(decoder or ''))}"),
        (voice is not None and not voice.exists(), f"--voice {voice}: no such file or folder{meant(voice or Path())}"),
    )  # fmt: skip
    problems = [text for broken, text in rules if broken]
    return problems + [f"--{problem}" for problem in speech_problems(None, pattern, **persona)]


def _loaded(audio: list[Path] | None, model: str, **options: Any) -> Model:
    """The model, once every sound is there; `options` are those of `load`."""
    if absent := [f"--audio {path}: no such file{meant(path)}" for path in audio or () if not path.is_file()]:
        raise ConfigError(absent)
    from covo_rl.run.python.model import load

    return load(model, **options)


def talk(conversation: Chat, lines: Iterator[str], sounds: list[Any], speak: Path | None = None) -> None:
    """Answer line by line; `sounds` go with the first question. What cannot be asked is said, and the talk goes on.

    With `speak` replies are written there, and sounds are asked without words by an empty line, or at the end.
    """
    for line in chain(lines, [""]):
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return
        if word == "/reset":
            conversation.reset()
            sounds = []
            say("forgotten: sounds, questions and replies", err=True)
        elif word == "/audio":
            is_file = Path(rest := rest.strip()).is_file()
            sounds += [Path(rest)] if is_file else []
            say(f"{rest} goes with the next question" if is_file else f"{rest or word}: no such file", err=True)
        elif word.startswith("/"):
            say(f"there is no {word}; {COMMANDS}", err=True)
        elif word or (speak and sounds):
            try:
                reply = conversation.ask(line.strip(), audio=list(sounds))
                say(reply.text)
                if speak:
                    _write(speak, reply)
            except (UserError, OSError) as error:  # kept, a sound that cannot be read would spoil all that follows
                say(f"{error}{'; its sounds are forgotten' if sounds else ''}", err=True)
            sounds = []


def _write(path: Path, reply: Reply) -> None:
    """The reply's wave to the first of reply.wav, reply-2.wav ... that is not there yet."""
    import soundfile

    if reply.wave is None or not len(reply.wave):
        say("the reply has no speech in it, so no file is written", err=True)
        return
    names = (path.with_stem(f"{path.stem}-{number}") if number > 1 else path for number in count(1))
    path = next(name for name in names if not name.exists())
    soundfile.write(path, reply.wave, RATE, subtype="PCM_16")
    say(f"{path}: {len(reply.wave) / RATE:.2f} s of speech", err=True)


def _lines() -> Iterator[str]:
    """What is typed, or piped in, until its end."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
