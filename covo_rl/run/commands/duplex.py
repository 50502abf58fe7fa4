"""`covo-rl duplex`: a model that listens while it speaks.

covo-rl duplex run --model PATH --audio user.wav --output runs/duplex
covo-rl duplex run --model PATH --audio user.wav --output runs/duplex --realtime
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covo_rl.data.terminal import say
from covo_rl.duplex.grid import CHUNK_SAMPLES, CHUNK_SECONDS, decision_time
from covo_rl.resolve import BUILTIN, ConfigError, meant
from covo_rl.speech import SHIPPED_DECODER
from covo_rl.speech.grid import RATE

if TYPE_CHECKING:
    import numpy as np

    from covo_rl.duplex.session import DuplexEvent, DuplexSession

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Full duplex: a model that listens while it speaks.",
)  # fmt: skip
CHANNELS = ("left", "right")
#: samples of a push: what a microphone hands over, 20 ms
BLOCK = CHUNK_SAMPLES // 8
#: chunks, of each kind, that are timed before a stream in real time
REHEARSED = 20


@app.callback()
def _duplex() -> None:
    """Keeps `run` a word of its own while it is the only one."""


@app.command("run")
def duplex_run_command(
    model: Annotated[str, typer.Option(help="checkpoint folder or hub name, with a duplex section in its config")],
    audio: Annotated[Path, typer.Option(help="sound file: what the user says, and keeps silent")],
    output: Annotated[Path, typer.Option(help="folder for stereo.wav, events.json and session.json")],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")] = None,
    channel: Annotated[str | None, typer.Option(help="of a file with two: left or right")] = None,
    tail: Annotated[float, typer.Option(min=0, max=600, help="seconds of silence after the file, for a reply")] = 0.0,
    realtime: Annotated[bool, typer.Option("--realtime", help="as from a microphone; refused where too slow")] = False,
    system: Annotated[str | None, typer.Option(help="system message; default: that of spoken dialogues")] = None,
    temperature: Annotated[float | None, typer.Option(min=1e-6, help="of text and codes; default: greedy")] = None,
    max_turn_seconds: Annotated[float, typer.Option(min=CHUNK_SECONDS, help="a reply is ended there")] = 60.0,
    max_positions: Annotated[int, typer.Option(min=1, help="of the context; whole oldest turns leave it")] = 8192,
    decoder: Annotated[str, typer.Option(help="decoder folder; default: the shipped one")] = SHIPPED_DECODER,
    voice: Annotated[Path | None, typer.Option("--voice", help="a recording, or folder of a prompt")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; found by itself")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of sampling")] = 0,
) -> None:
    """Let a model listen to a file, and speak when it wants to."""
    if problems := _problems(audio, output, channel, decoder, voice):
        raise ConfigError(problems)
    heard_T = _user_channel(audio, channel, tail)
    from covo_rl.duplex.latency import check_real_time
    from covo_rl.duplex.realtime import rehearse
    from covo_rl.duplex.recording import spoken_replies

    options: dict[str, Any] = {"max_turn_seconds": max_turn_seconds, "max_positions": max_positions, "seed": seed}
    session = open_session(model, adapter, device, temperature, **options, **({"system": system} if system else {}))
    say_codes = _voice(session, decoder, voice)
    if realtime:
        check_real_time(rehearse(session, REHEARSED))
    late = _listen(session, heard_T, realtime)
    replies = spoken_replies(session.decisions, session.ids)
    _write(output, audio, heard_T, session, replies, say_codes, late, seed)
    if realtime:
        check_real_time(session.costs)


def _problems(audio: Path, output: Path, channel: str | None, decoder: str, voice: Path | None) -> list[str]:
    """What is wrong with these options, before anything is loaded."""
    rules = (
        (not audio.is_file(), f"--audio {audio}: no such file{meant(audio)}"),
        (channel not in (None, *CHANNELS), f"--channel {channel!r}: there are {', '.join(CHANNELS)}"),
        (output.exists() and (not output.is_dir() or any(output.iterdir())),
         f"--output {output} exists and is not an empty folder: name another"),
        (not decoder.startswith(BUILTIN) and not Path(decoder).is_dir(),
         f"--decoder {decoder}: no such folder{meant(Path(decoder))}"),
        (voice is not None and not voice.exists(), f"--voice {voice}: no such file or folder{meant(voice or Path())}"),
    )  # fmt: skip
    return [text for broken, text in rules if broken]


def _user_channel(audio: Path, channel: str | None, tail: float) -> np.ndarray:
    """(T,) float32 at 24 kHz: the file, or one channel of it, and silence after it."""
    import numpy as np
    import soundfile

    from covo_rl.audio import AudioError, decode, resample
    from covo_rl.types import Clip

    clip = Clip(path=str(audio))
    try:
        channels = soundfile.info(audio).channels
    except soundfile.LibsndfileError:  # of a container that soundfile does not read; `decode` says what is wrong
        channels = 1
    if channels == 2:
        if channel is None:
            raise AudioError(
                f"--audio {audio} has two channels, and one of them is the user's: --channel left or right"
            )
        both, rate = soundfile.read(audio, dtype="float32", always_2d=True)
        clip = Clip(array=both[:, CHANNELS.index(channel)], sampling_rate=rate)
    elif channel is not None:
        raise AudioError(f"--channel {channel}: {audio} has no two channels")
    heard_T = resample(*decode(clip), RATE)
    return np.concatenate([heard_T, np.zeros(round(tail * RATE), np.float32)])


def open_session(
    model: str, adapter: str | None = None, device: str | None = None, temperature: float | None = None, **options: Any
) -> DuplexSession:
    """A session of the model in a folder, which its own streaming encoder hears for; `options` are DuplexSession's."""
    from covo_rl.audio import ClipStore
    from covo_rl.config import AdapterConfig, ModelConfig
    from covo_rl.duplex.ids import DuplexIds
    from covo_rl.duplex.session import GREEDY, DuplexSession
    from covo_rl.engines.draws import Drawing
    from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
    from covo_rl.policy.loading import answering_policy
    from covo_rl.train.launch import device_of

    policy, _ = answering_policy(
        ModelConfig(model=model), AdapterConfig(adapter=adapter), clips=ClipStore(), device=device_of(device)
    )
    how = GREEDY if temperature is None else Drawing(temperature=temperature)
    family: Any = policy.family
    ids = DuplexIds.of(family)  # says what a model lacks that was not made for it
    return DuplexSession(family, StreamingEncoder.of(family.model), ids=ids, text=how, codes=how, **options)


def _voice(session: DuplexSession, decoder: str, voice: Path | None) -> Callable[[Sequence[int]], np.ndarray]:
    """Codes -> what they sound like."""
    from covo_rl.speech.voices import open_voice

    speaker = open_voice(decoder, voice, device=session.device).fit(session.ids.num_codes)
    return lambda codes: speaker.say(codes).numpy()


def _listen(session: DuplexSession, heard_T: np.ndarray, realtime: bool) -> list[float]:
    """Push the sound; say what happens. How late the events of each chunk came in real time, in seconds."""
    blocks = (heard_T[start : start + BLOCK] for start in range(0, len(heard_T), BLOCK))
    late: list[float] = []
    began = time.monotonic()
    for block in paced(blocks) if realtime else blocks:
        for event in session.push(block):
            if realtime and event.type == "decision":
                late.append(time.monotonic() - began - decision_time(event.chunk))
            _show(event)
    for event in session.end():
        _show(event)
    return late


def paced(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks, each not before the time that it has lasted has passed, as from a microphone."""
    began, samples = time.monotonic(), 0
    for block in blocks:
        samples += len(block)
        time.sleep(max(0.0, began + samples / RATE - time.monotonic()))
        yield block


SHOWN = {"shift": "begins to speak", "break": "is silent"}


def _show(event: DuplexEvent) -> None:
    forced = " (max_turn_seconds)" if event.forced and event.type == "decision" else ""
    if event.type == "decision" and event.decision in SHOWN:
        say(f"{event.time:7.2f} s  {SHOWN[event.decision]}{forced}")
    elif event.type == "text":
        say(f"{event.time:7.2f} s  {event.text}")
    elif event.type == "dropped":
        say(f"{event.time:7.2f} s  the context is full: {event.count} chunks of its oldest turns left it", err=True)


def _write(
    output: Path, audio: Path, heard_T: np.ndarray, session: DuplexSession, replies: list[Any],
    say_codes: Callable[[Sequence[int]], np.ndarray], late: list[float], seed: int,
) -> None:  # fmt: skip
    import soundfile

    from covo_rl.data.files import write_json
    from covo_rl.duplex.recording import EVENTS, SESSION, STEREO, latency_record, stereo, stream_events, write_session

    both_T2 = stereo(heard_T, replies, say_codes)
    vocoder = _first_block_seconds(replies, say_codes)
    latency = latency_record(replies, session.costs, vocoder, late)
    output.mkdir(parents=True, exist_ok=True)
    soundfile.write(output / STEREO, both_T2, RATE, subtype="PCM_16")
    tokenizer = session.family.tokenizer
    events = stream_events(audio.stem, len(both_T2), replies, tokenizer, source=audio.name, seed=seed)
    write_json(output / EVENTS, events, indent=1)
    write_session(output / SESSION, session.system_ids, session.decisions, latency)
    spoken = sum(len(reply.codes) for reply in replies) / 25
    factors = ", ".join(f"{name} {factor['p95']:.2f}" for name, factor in latency["real_time_factors"].items())
    say(f"{len(session.decisions)} chunks of {CHUNK_SECONDS} s, {len(replies)} replies, {spoken:.2f} s of speech; "
        f"real-time factor (p95): {factors}; written to {output}")  # fmt: skip


def _first_block_seconds(replies: list[Any], say_codes: Callable[[Sequence[int]], np.ndarray]) -> float | None:
    """What the decoder takes for the four codes of a chunk; None where nothing was said."""
    codes = next((reply.codes[:4] for reply in replies if reply.codes), None)
    if codes is None:
        return None
    began = time.perf_counter()
    say_codes(codes)
    return time.perf_counter() - began
