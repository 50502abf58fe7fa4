"""`covo-rl duplex`: a model that listens while it speaks.

covo-rl duplex prepare --model PATH --output models/duplex
covo-rl duplex run --model PATH --audio user.wav --output runs/duplex
covo-rl duplex run --model PATH --audio user.wav --output runs/duplex --realtime
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covo_rl.data.terminal import say
from covo_rl.duplex.grid import CHUNK_CODES, CHUNK_SAMPLES, CHUNK_SECONDS
from covo_rl.models.text import unfit
from covo_rl.records.lock import FolderLock
from covo_rl.resolve import BUILTIN, ConfigError, meant
from covo_rl.speech import SHIPPED_DECODER
from covo_rl.speech.grid import RATE

if TYPE_CHECKING:
    import numpy as np

    from covo_rl.duplex.realtime import LiveRun
    from covo_rl.duplex.recording import SpokenReply
    from covo_rl.duplex.session import DuplexEvent, DuplexSession
    from covo_rl.models.covo_audio.voice import Voice

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Full duplex: a model that listens while it speaks.",
)  # fmt: skip
CHANNELS = ("left", "right")
#: samples of a push: what a microphone hands over, 20 ms
BLOCK = CHUNK_SAMPLES // 8
#: chunks, of each kind, that are timed before a stream in real time
REHEARSED = 20


@app.command("prepare")
def duplex_prepare_command(
    model: Annotated[str, typer.Option(help="checkpoint folder or hub name of a Covo-Audio")],
    output: Annotated[Path, typer.Option(help="a new folder: the checkpoint with a duplex section in its config")],
    use_ids: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="ids of think, shift, break; default: those before audio code 0")
    ] = None,
    silence_codes: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="codes that sound like silence; the first code is 0")
    ] = None,
) -> None:
    """Make a checkpoint ready for full duplex: three tokens, that nothing uses, become think, shift and break.

    Says what the tokenizer calls them, and refuses tokens that look trained unless --use-ids names them. No token is
    added. Their rows in embeddings and head become the mean of the text rows; training does the rest.
    """
    from covo_rl.export.exporting import staging
    from covo_rl.export.merged import write_merged
    from covo_rl.models import load_family
    from covo_rl.models.builtin import resolve_model
    from covo_rl.models.covo_audio.duplex_tokens import prepare_duplex

    ids, codes = _numbers("--use-ids", use_ids), _numbers("--silence-codes", silence_codes)
    if why := f"{output} exists: name a new folder" if output.exists() else FolderLock(output).refusal():
        raise ConfigError([f"--output {why}"])
    family = load_family(resolve_model(model))
    if family.model_type != "covo_audio":
        raise ConfigError([f"--model {model}: it is a {family.model_type}, and only a Covo-Audio can be prepared"])
    if family.model.config.duplex is not None:
        raise ConfigError([f"--model {model}: it has a duplex section already, {family.model.config.duplex}"])
    prepare_duplex(family.model, family.tokenizer, ids, silence_codes=codes or [])
    with staging(output, replace=False) as stage:
        write_merged(family, stage)
    say(f"{output}: ready to be trained for full duplex")


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Whole numbers between commas; None of None."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not (part.isascii() and part.isdigit())]:
        raise ConfigError([f"{option} {text!r}: {wrong[0]!r} is no whole number; write them with commas, as 30,31,32"])
    return [int(part) for part in parts]


@app.command("run")
def duplex_run_command(
    model: Annotated[str, typer.Option(help="checkpoint folder or hub name, with a duplex section in its config")],
    audio: Annotated[Path, typer.Option(help="sound file: what the user says, and keeps silent")],
    output: Annotated[Path, typer.Option(help="folder for stereo.wav, events.json and session.json")],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")] = None,
    channel: Annotated[str | None, typer.Option(help="of a file with two: left or right")] = None,
    tail: Annotated[float, typer.Option(min=0, max=600, help="seconds of the room's tone after the file")] = 0.0,
    realtime: Annotated[bool, typer.Option("--realtime", help="as from a microphone; refused where too slow")] = False,
    system: Annotated[str | None, typer.Option(help="system message; default: that of spoken dialogues")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="of text and codes; default: greedy")
    ] = None,
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
    heard_T = _user_channel(audio, channel, tail, seed)
    from covo_rl.duplex.latency import check_real_time
    from covo_rl.duplex.realtime import rehearse

    options: dict[str, Any] = {"max_turn_seconds": max_turn_seconds, "max_positions": max_positions, "seed": seed}
    session = open_session(model, adapter, device, temperature, **options, **({"system": system} if system else {}))
    speaker = open_speaker(session, decoder, voice)
    if not realtime:
        for start in range(0, len(heard_T), BLOCK):
            _show_all(session.push(heard_T[start : start + BLOCK]))
        _show_all(session.end())
        _write(output, audio, heard_T, session, speaker, seed)
        return
    check_real_time(rehearse(session, speaker, REHEARSED))
    live = _live_run(session, speaker, heard_T)
    _write(output, audio, heard_T, session, speaker, seed, live)
    check_real_time(live.costs)


def _problems(audio: Path, output: Path, channel: str | None, decoder: str, voice: Path | None) -> list[str]:
    """What is wrong with these options, before anything is loaded."""
    locked, unnamed = FolderLock(output).refusal(), unfit(audio.name)
    rules = (
        (not audio.is_file(), f"--audio {audio}: no such file{meant(audio)}"),
        (channel not in (None, *CHANNELS), f"--channel {channel!r}: there are {', '.join(CHANNELS)}"),
        (taken := output.exists() and (not output.is_dir() or any(output.iterdir())),
         f"--output {output} exists and is not an empty folder: name another"),
        (not taken and locked, f"--output {locked}"),
        (unnamed, f"--audio {audio}: its name, which the stream gets, {unnamed}; rename it"),
        (not decoder.startswith(BUILTIN) and not Path(decoder).is_dir(),
         f"--decoder {decoder}: no such folder{meant(Path(decoder))}"),
        (voice is not None and not voice.exists(), f"--voice {voice}: no such file or folder{meant(voice or Path())}"),
    )  # fmt: skip
    return [text for broken, text in rules if broken]


def _user_channel(audio: Path, channel: str | None, tail: float, seed: int) -> np.ndarray:
    """(T,) float32 at 24 kHz: the file, or one channel, then its room: zeros would tell that it is over."""
    import numpy as np

    from covo_rl.audio import AudioError, decode_channels, resample, to_mono
    from covo_rl.duplex.sound import with_tail
    from covo_rl.types import Clip

    wave_TC, rate = decode_channels(Clip(path=str(audio)))
    if wave_TC.shape[1] == 2 and channel is None:
        raise AudioError(f"--audio {audio} has two channels, and one of them is the user's: --channel left or right")
    if wave_TC.shape[1] != 2 and channel is not None:
        raise AudioError(f"--channel {channel}: {audio} has no two channels")
    wave_T = to_mono(wave_TC, str(audio)) if channel is None else wave_TC[:, CHANNELS.index(channel)]
    heard_T = resample(wave_T, rate, RATE)
    return with_tail(heard_T, tail, np.random.default_rng(seed)) if tail else heard_T


def open_session(
    model: str, adapter: str | None = None, device: str | None = None, temperature: float | None = None, **options: Any
) -> DuplexSession:
    """A session of the model in a folder, which its own streaming encoder hears for; `options` are DuplexSession's."""
    from covo_rl.audio import ClipStore
    from covo_rl.config import AdapterConfig, ModelConfig
    from covo_rl.duplex.session import GREEDY, DuplexSession
    from covo_rl.engines.draws import Drawing
    from covo_rl.policy.loading import answering_policy
    from covo_rl.train.launch import device_of

    policy, _ = answering_policy(
        ModelConfig(model=model), AdapterConfig(adapter=adapter), clips=ClipStore(), device=device_of(device)
    )
    how = GREEDY if temperature is None else Drawing(temperature=temperature)
    return DuplexSession.of(policy.family, text=how, codes=how, **options)


def open_speaker(session: DuplexSession, decoder: str, voice: Path | None) -> Voice:
    """Who speaks the session's codes."""
    from covo_rl.speech.voices import open_voice

    return open_voice(decoder, voice, device=session.device).fit(session.ids.num_codes)


def _live_run(session: DuplexSession, speaker: Voice, heard_T: np.ndarray) -> LiveRun:
    """The sound as from a microphone, and the replies as they were heard."""
    from covo_rl.duplex.realtime import LiveRun, WallClock, paced
    from covo_rl.duplex.recording import heard_chunks, in_heard

    heard_C = heard_chunks(heard_T)
    blocks = (heard_T[start : start + BLOCK] for start in range(0, len(heard_T), BLOCK))
    clock = WallClock()
    live = LiveRun(session, speaker, clock, interrupted=lambda chunk: in_heard(chunk, heard_C), show=_show)
    live.listen(paced(blocks, clock))
    return live


SHOWN = {"shift": "begins to speak", "break": "is silent"}


def _show(event: DuplexEvent) -> None:
    forced = " (max_turn_seconds)" if event.forced and event.type == "decision" else ""
    if event.type == "decision" and event.decision in SHOWN:
        say(f"{event.time:7.2f} s  {SHOWN[event.decision]}{forced}")
    elif event.type == "text":
        say(f"{event.time:7.2f} s  {event.text}")
    elif event.type == "dropped":
        say(f"{event.time:7.2f} s  the context is full: {event.count} chunks of its oldest turns left it", err=True)


def _show_all(events: Sequence[DuplexEvent]) -> None:
    for event in events:
        _show(event)


def _write(
    output: Path, audio: Path, heard_T: np.ndarray, session: DuplexSession, speaker: Voice, seed: int,
    live: LiveRun | None = None,
) -> None:  # fmt: skip
    from covo_rl.duplex.recording import (
        SESSION,
        ReplySound,
        heard_chunks,
        latency_record,
        session_stream,
        spoken_replies,
        stereo,
        was_interrupted,
        write_session,
    )
    from covo_rl.duplex.stream_files import write_stream

    replies = spoken_replies(session.decisions, session.ids)
    said = [reply for reply in replies if reply.codes]
    heard_C = heard_chunks(heard_T)
    waves = live.sounds if live else [(reply.start_sample, speaker.say(reply.codes).numpy()) for reply in said]
    sounds = [ReplySound(reply, *wave, was_interrupted(reply, session.decisions, heard_C))
              for reply, wave in zip(said, waves, strict=True)]  # fmt: skip
    both_T2 = stereo(heard_T, sounds)
    costs = live.costs if live else session.costs
    latency = latency_record(replies, costs, _first_block_seconds(said, speaker)) | (live.record() if live else {})
    stream = session_stream(audio.stem, len(both_T2), sounds, session.family.tokenizer, source=audio.name, seed=seed)
    write_stream(output, stream, both_T2)
    write_session(output / SESSION, session.system_ids, session.decisions, latency)
    spoken = sum(len(reply.codes) for reply in said) * CHUNK_SECONDS / CHUNK_CODES
    factors = ", ".join(f"{name} {factor['p95']:.2f}" for name, factor in latency["real_time_factors"].items())
    say(f"{len(session.decisions)} chunks of {CHUNK_SECONDS} s, {len(replies)} replies, {spoken:.2f} s of speech; "
        f"real-time factor (p95): {factors}; written to {output}")  # fmt: skip


def _first_block_seconds(said: Sequence[SpokenReply], speaker: Voice) -> float | None:
    """What the decoder takes for the four codes of a chunk; None where nothing was said."""
    if not said:
        return None
    began = time.perf_counter()
    speaker.say(said[0].codes[:CHUNK_CODES])
    return time.perf_counter() - began
