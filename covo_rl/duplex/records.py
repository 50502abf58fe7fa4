"""What a step of learning when to stop leaves behind: rows of rollouts/step_N.jsonl, a line of metrics.jsonl, sounds.

    sounds = TimingSounds(run.folder)
    kept = {stream.id: sounds.keep(stream, greedy_stop(z_K))}              of as many streams as one wants to hear
    run.log_rollouts(step, timing_rows(streams, z, totals, stops_PG, advantages_PG, parts, sounds=kept))
    run.log_metrics(timing_step_metrics(streams, z, stops_PG, table, step=step, losses=metrics, ...))

Rows have the keys of all rollouts (records/steps.py), the columns that the rewards were given, and two more: `speech`,
from when to when the model sounds, and in the first row of a group `timing`, which the report draws for all of it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from covo_rl.algo.advantage import ZERO_STD
from covo_rl.data.files import plain
from covo_rl.duplex.content import reply_columns
from covo_rl.duplex.features import FeatureStream
from covo_rl.duplex.grid import decision_time
from covo_rl.duplex.recorded import RecordedStream
from covo_rl.duplex.rollout import StopReply, TimingStream, stop_logps
from covo_rl.duplex.sonify import model_words, speech_span, stream_sound, user_words
from covo_rl.records.sounds import SoundFolder
from covo_rl.records.steps import StepShare, step_metrics
from covo_rl.speech.grid import RATE
from covo_rl.synth.timed import TimedWord
from covo_rl.types import RewardTable

#: bytes of sounds that a run keeps
SOUND_LIMIT = 64_000_000
#: figures of a step that say nothing of a rollout that is one number
_OF_TEXT = ("truncated", "format_broken", "thinking_words", "sampling/entropy", "engine/lag")


class TimingSounds:
    """Sounds of streams in RUN/clips, each as heard where the model stops somewhere, until there are `limit` bytes."""

    def __init__(self, run: Path, *, limit: int = SOUND_LIMIT, seed: int = 0, split: str = "train") -> None:
        self.folder, self.voice = SoundFolder(run, limit), {"seed": seed, "split": split}

    def keep(self, stream: TimingStream, stop: int) -> tuple[str, str] | None:
        """(name, key) of the sound of a rollout that stopped there, of a recorded stream the user's channel; None where
        there is no sound of it, or no more room.

        Raises:
            OSError: the disk is full, or the file of a recorded stream can no longer be read.
        """
        name = f"{stream.id}, {stop_text(stream, stop)}"
        if isinstance(stream, RecordedStream):
            name, wave_T = f"{stream.id}, the user", stream.user_channel()
        elif isinstance(stream, FeatureStream):
            wave_T = stream_sound(stream, stop, **self.voice)
        else:
            return None
        file = io.BytesIO()
        soundfile.write(file, wave_T, RATE, format="FLAC", subtype="PCM_16")
        key = sha256(file.getvalue()).hexdigest()
        kept = key in self.folder or self.folder.put(key, ".flac", file.getvalue())
        return (name, key) if kept else None


def stop_text(stream: TimingStream, stop: int) -> str:
    """What such a rollout did: "SHIFT at 3.36 s", "no BREAK"."""
    time, name = stream.time(stop), "SHIFT" if stream.listening else "BREAK"
    return f"no {name}" if time is None else f"{name} at {time:.2f} s"


def timing_rows(
    streams: Sequence[TimingStream], z: Sequence[torch.Tensor], totals: Sequence[np.ndarray], stops_PG: np.ndarray,
    advantages_PG: np.ndarray, parts: Sequence[Mapping[str, np.ndarray]], *,
    failures: Sequence[Mapping[str, str]] = (), sounds: Mapping[str, tuple[str, str] | None] | None = None,
    first_group: int = 0, replies: Sequence[Mapping[int, StopReply]] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """One JSON-ready row per rollout, G for each of P streams.

    Args:
        z: logits (K,) of each stream; totals, parts, failures: what its stops earn, as `score_stops` says.
        sounds: id of a stream -> (name, key) of its sound, of those that have one.
        replies: what is said after stops, where that was decoded; such rows have two columns more, `reply`, `expected`.

    Raises:
        ValueError: there are not as many of each.
    """
    rows = []
    nothing: list[Any] = [{}] * len(streams)
    of_streams = failures or nothing, replies or nothing
    together = zip(streams, z, totals, stops_PG.tolist(), plain(advantages_PG), parts, *of_streams, strict=True)
    for p, (stream, z_K, total_S, stops, shares, scores, missing, said) in enumerate(together):
        logps_S = stop_logps(z_K.detach().double()).cpu().numpy()
        words = _words(stream)
        group = {**_shared(stream, words, (sounds or {}).get(stream.id)), "group": first_group + p}
        columns = stream.columns(stops)
        if replies:
            columns |= reply_columns(stream.answer, [said.get(stop) for stop in stops])
        for g, stop in enumerate(stops):
            length = min(stop + 1, stream.decisions)
            rows.append({
                **group, "rollout": g, **_done(stream, stop, said), "completion_codes": [], "parsed_answer": None,
                "problems": [],
                "rewards": {**{name: plain(score_S[stop]) for name, score_S in scores.items()},
                            **dict.fromkeys(missing)},
                "missing": dict(missing), "reward_total": plain(total_S[stop]), "advantage": shares[g],
                "length": length, "lag": 0, "mean_logp": plain(logps_S[stop] / length), "token_logps": None,
                "timing": None if g else _timing(stream, z_K, words),
                "speech": plain(speech_span(stream, stop)), **{name: values[g] for name, values in columns.items()},
            })  # fmt: skip
    return rows


def timing_step_metrics(
    streams: Sequence[TimingStream], z: Sequence[torch.Tensor], stops_PG: np.ndarray, table: RewardTable, *,
    losses: Mapping[str, float] | None = None, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """A line of metrics.jsonl after `others` (step, seconds, grad_norm, learning_rate, ...), by the names that report
    and monitor know.

    `losses` are those of `timing_loss`: they become `timing/NAME`, and its KL, the sum over a stream, also `kl`, per
    decision, as elsewhere per token. `timing/entropy` is that of the stops, in nats. `none_NAME` counts rollouts that
    the component does not judge.
    """
    lengths_PG = np.minimum(stops_PG + 1, [[stream.decisions] for stream in streams])
    logps = [stop_logps(z_K.detach().double()).cpu().numpy() for z_K in z]
    surprisal_PG = -np.array([logps_S[stops] for logps_S, stops in zip(logps, stops_PG, strict=True)])
    zeros_N = np.zeros(stops_PG.size)
    share = StepShare(
        table, lengths_PG.ravel().astype(float), zeros_N, zeros_N, zeros_N, surprisal_PG.ravel(),
        (np.ptp(table.rewards_PG, axis=1) > ZERO_STD).astype(float), zeros_N,
    )  # fmt: skip
    own = {f"timing/{name.removeprefix('timing_')}": value for name, value in (losses or {}).items()}
    own["timing/entropy"] = float(np.mean([-(np.exp(logps_S) * np.fmax(logps_S, -1e3)).sum() for logps_S in logps]))
    if "timing/kl" in own:
        own["kl"] = own["timing/kl"] / float(np.mean([stream.decisions for stream in streams]))
    return {name: value for name, value in step_metrics([share], {**others, **own}).items() if name not in _OF_TEXT}


def _done(stream: TimingStream, stop: int, replies: Mapping[int, StopReply]) -> dict[str, Any]:
    """What a rollout did and said, and what rewards logged of that."""
    done, reply = stop_text(stream, stop), replies.get(stop)
    logged = {name: "" if reply is None else reply.notes[name] for each in replies.values() for name in each.notes}
    return {
        "completion": done if reply is None else f"{done}: {reply.text.strip()}",
        "stop_reason": "length" if reply is not None and reply.cut else "stop", **logged,
    }  # fmt: skip


def stop_table(
    totals: Sequence[np.ndarray], stops_PG: np.ndarray, parts: Sequence[Mapping[str, np.ndarray]],
    failures: Sequence[Mapping[str, str]] = (),
) -> RewardTable:  # fmt: skip
    """What the rollouts that stopped there earned, G of each of P streams."""
    failed = failures or [{}] * len(parts)
    names = tuple(dict.fromkeys(name for each in (*parts, *failed) for name in each))
    together = list(zip(totals, stops_PG, parts, failed, strict=True))
    nothing = np.full(stops_PG.shape[1], np.nan)
    rewards_PRG = [[part[name][stops] if name in part else nothing for name in names] for _, stops, part, _ in together]
    totals_PG = np.array([total_S[stops] for total_S, stops, *_ in together])
    missing = {
        (p, g, name): why for p, (*_, reasons) in enumerate(together) for name, why in reasons.items()
        for g in range(stops_PG.shape[1])
    }  # fmt: skip
    return RewardTable(names, np.ones(len(names)), np.array(rewards_PRG).transpose(0, 2, 1), totals_PG, missing)


def _shared(stream: TimingStream, words: Sequence[Mapping[str, Any]], sound: tuple[str, str] | None) -> dict[str, Any]:
    """What the rows of a stream have in common."""
    return {
        "id": stream.id,
        "clips": [] if sound is None else [sound[0]],
        "clip_keys": [] if sound is None else [sound[1]],
        "question": _question(stream, words),
        "choices": [],
        "answer": _answer(stream),
        "cue": stream.cue or None,
    }


def _timing(stream: TimingStream, z_K: torch.Tensor, words: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a timeline of a stream shows."""
    end = max([decision_time(stream.first_chunk + stream.decisions), *(word["end"] for word in words)])
    if isinstance(stream, FeatureStream):
        end = max(end, decision_time(stream.chunks - 1))
    return plain({
        "kind": stream.kind, "seconds": end, "first_chunk": stream.first_chunk,
        "hazards": [round(hazard, 4) for hazard in z_K.detach().sigmoid().tolist()], "turn_end": stream.turn_end,
        "onset": stream.onset, "pauses": stream.pauses, "turns": words,
    })  # fmt: skip


def _words(stream: TimingStream) -> list[dict[str, Any]]:
    """Who says what from when to when, in order: words where they are known, else the spans of speech."""
    if isinstance(stream, FeatureStream):
        said = {"user": user_words(stream), "model": [] if stream.listening else model_words(stream, stream.decisions)}
    elif isinstance(stream, RecordedStream):
        said = {who: [TimedWord(text, start, end) for channel, start, end, text in stream.said if channel == who]
                for who in ("user", "model")}  # fmt: skip
    elif stream.listening:
        edges = [0.0, *(second for pause in stream.pauses for second in pause), stream.turn_end or 0.0]
        said = {"user": [TimedWord("", *span) for span in zip(edges[::2], edges[1::2], strict=True)]}
    else:
        event = [] if stream.onset is None else [TimedWord("", stream.onset, stream.turn_end or stream.onset)]
        start, end = speech_span(stream, stream.decisions) or (0.0, 0.0)
        said = {"user": event, "model": [TimedWord("", start, end or start)]}
    words = [{"channel": channel, "start": word.start, "end": word.end, "text": word.text}
             for channel, each in said.items() for word in each]  # fmt: skip
    return sorted(words, key=lambda word: word["start"])


def _question(stream: TimingStream, words: Sequence[Mapping[str, Any]]) -> str:
    """What is heard, as a line of text: pauses by their length, and the reply of a model that speaks in brackets."""
    reply = [word for word in words if word["channel"] == "model"]
    pieces, pauses = [], list(stream.pauses)
    for word in (word for word in words if word["channel"] == "user"):
        if reply and word["start"] >= reply[0]["start"]:
            pieces.append(f"[{_said(reply)}]")
            reply = []
        while pauses and pauses[0][1] <= word["start"] + 1e-6:
            start, end = pauses.pop(0)
            pieces.append(f"({end - start:.2f} s)")
        pieces.append(_said([word]))
    return " ".join([*pieces, *([f"[{_said(reply)}]"] if reply else [])])


def _said(words: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(word["text"] or f"{word['start']:.2f}-{word['end']:.2f} s" for word in words)


def _answer(stream: TimingStream) -> str:
    """What would be right."""
    if stream.listening:
        return f"SHIFT after {stream.turn_end:.2f} s"
    return f"BREAK after {stream.onset:.2f} s" if stream.kind == "barge_in" else "no BREAK"
