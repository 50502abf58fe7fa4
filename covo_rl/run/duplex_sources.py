"""Rows of dialogues, and of back-channels, as what streams are simulated from. All that is wrong is said at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.data.read import DataError, Problem
from covo_rl.data.sources import source_name
from covo_rl.duplex.sources import Recording, SourceDialogue, SourceTurn, dialogue_problems
from covo_rl.speech.rows import SpeechRow, read_speech_rows, recording_problems
from covo_rl.supervised.pretrain.dialogue_rows import DialogueRow, DialogueTurn, read_dialogues
from covo_rl.synth.back_channels import BACK_CHANNEL_SECONDS

if TYPE_CHECKING:
    from covo_rl.data.memory import Source


def source_dialogues(source: Source, audio_dir: str | Path | None = None) -> list[SourceDialogue]:
    """Dialogues of a file of rows, whose turns must all have recordings, each of which is read once to be sure of it.

    The speaker of a user is that of his turn; the row's own is the assistant's.

    Raises:
        DataError: every problem of every row and recording.
    """
    rows = read_dialogues(source, audio_dir)
    problems = [problem for row in rows for turn in row.turns if (problem := _without_sound(turn))]
    problems += recording_problems(turn.said for row in rows for turn in row.turns if turn.said.clip is not None)
    dialogues = [_dialogue(row) for row in rows]
    problems += dialogue_problems(dialogues)
    if problems:
        raise DataError(source_name(source), problems)
    return dialogues


def _without_sound(turn: DialogueTurn) -> Problem | None:
    if turn.said.clip is not None:
        return None
    hint = "; `covo-rl speech decode` makes one of its codes" if turn.said.codes is not None else ""
    return Problem(turn.said.id, f"the {turn.role}'s turn has no audio, which a stream needs of both{hint}")


def _dialogue(row: DialogueRow) -> SourceDialogue:
    known = [row.source.get("language"), *(turn.said.language for turn in row.turns)]
    digests = [row.source.get("tokenizer"), *(turn.said.source.get("tokenizer") for turn in row.turns)]
    turns = tuple(_turn(turn.said, turn.role) for turn in row.turns)
    return SourceDialogue(row.id, turns, _first_text(known), _first_text(digests))


def _first_text(values: Sequence[Any]) -> str | None:
    return next((value for value in values if isinstance(value, str)), None)


def _turn(said: SpeechRow, role: str) -> SourceTurn:
    codes = None if said.codes is None or role == "user" else tuple(said.codes.tolist())
    channel = "user" if role == "user" else "model"
    return SourceTurn(channel, said.wave, said.text, said.words, codes, said.speaker)


def read_back_channels(source: Source, audio_dir: str | Path | None = None) -> tuple[SourceTurn, ...]:
    """Recorded back-channels from rows of speech: text and audio, 0.2 to 0.6 s of speech.

    Raises:
        DataError: every problem of every row.
    """
    rows = read_speech_rows(source, audio_dir, needs=("audio", "text"))
    problems = recording_problems(rows)
    turns = tuple(_turn(row, "user") for row in rows)
    if not problems:
        low, high = BACK_CHANNEL_SECONDS
        for row, turn in zip(rows, turns, strict=True):
            islands = Recording(turn).islands
            seconds = islands[-1][1] - islands[0][0]
            if not low - 0.02 <= seconds <= high + 0.02:
                problems.append(Problem(row.id, f"{seconds:.2f} s of speech: a back-channel has {low} to {high} s"))
    if problems:
        raise DataError(source_name(source), problems)
    return turns
