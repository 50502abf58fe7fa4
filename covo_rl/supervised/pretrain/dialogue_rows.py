"""Rows of dialogues: who says what, aloud or in writing. All that is wrong is said at once.

    {"id": "d1", "system": "Be brief.", "speaker": "anna", "emotion": "joy", "turns": [
        {"role": "user", "audio": "d1-1.wav", "text": "how are you"},
        {"role": "assistant", "text": "I am well.", "codes": [17, 3], "tokenizer": "9c0e..."}]}

A turn has what a row of speech has: `text` (of a user's recording what is said in it, or asked about it), `audio`,
`codes` with the `tokenizer` that made them. `speaker` is the assistant's voice, `emotion` what it expresses, in all of
its turns; a turn of the assistant may have an `emotion` of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.data.folder import AudioFolder
from covo_rl.data.load import audio_root
from covo_rl.data.read import DataError, Problem, Row, printable
from covo_rl.data.sources import read_rows, source_name
from covo_rl.models.covo_audio.persona import persona_problems
from covo_rl.models.text import unfit
from covo_rl.speech.rows import SAME_ID, SpeechRow, SpeechRowReader, named_row

if TYPE_CHECKING:
    from covo_rl.data.memory import Source

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class DialogueTurn:
    """`said`: text, recording and codes, as a row of speech whose id is `ROW#NUMBER`, turns being numbered from 1."""

    role: str
    said: SpeechRow
    emotion: str | None = None


@dataclass(frozen=True)
class DialogueRow:
    """Turns of user and assistant, the last of which is the assistant's.

    `system` None: none is given, and the default takes its place; "": there is none.
    `source` is the row as it stands in the file.
    """

    id: str
    turns: tuple[DialogueTurn, ...] = ()
    system: str | None = None
    speaker: str | None = None
    emotion: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recordings(self) -> dict[str, SpeechRow]:
        """The turns that are recorded, by the ids that the clips of a document name."""
        return {turn.said.id: turn.said for turn in self.turns if turn.said.clip is not None}


def read_dialogue(
    row: Row, audio_dir: str | Path = ".", *, codebook: int | None = None, tokenizer: str | None = None
) -> DialogueRow:
    """One row, its paths relative to `audio_dir`; the other arguments are those of `read_dialogues`.

    Raises:
        DataError: everything that is wrong with it.
    """
    reader = DialogueRowReader(AudioFolder(Path(audio_dir), False, ()), (), codebook, tokenizer)
    read = reader.read(1, row)
    if reader.problems:
        raise DataError("dialogue", reader.problems)
    return read


def read_dialogues(
    source: Source, audio_dir: str | Path | None = None, *, codebook: int | None = None, tokenizer: str | None = None
) -> list[DialogueRow]:
    """All rows of a JSONL file, or of whatever `load_examples` reads.

    Args:
        audio_dir: folder of the paths; default: that of the file.
        codebook: how many codes there are; others are refused.
        tokenizer: digest of the tokenizer that must have made the codes.

    Raises:
        DataError: every problem of every row.
    """
    folder = AudioFolder(audio_root(source, audio_dir), False, ())
    reader = DialogueRowReader(folder, (), codebook, tokenizer, unique=True)
    rows = [reader.read(number, row) for number, row in enumerate(read_rows(source), 1)]
    if reader.problems:
        raise DataError(source_name(source), reader.problems)
    return rows


class DialogueRowReader:
    """Reads rows and notes what is wrong with them: `problems`. With `unique` no two rows may have the same id.

    `needs`, which every reader of rows takes: "codes" asks for those of every assistant's turn, "audio" for the
    recording of a user's turn.
    """

    def __init__(
        self, folder: AudioFolder, needs: Collection[str] = (), codebook: int | None = None,
        tokenizer: str | None = None, *, unique: bool = False,
    ) -> None:  # fmt: skip
        self._turns = SpeechRowReader(folder, (), codebook, tokenizer, unique=False)
        self.needs, self.unique = frozenset(needs), unique
        self.problems: list[Problem] = []
        self.ids: set[str] = set()

    def read(self, number: int | str, row: Row) -> DialogueRow:
        """A row, named `row {number}` where it has no id; whatever is wrong with it is left out of it."""
        name, wrong = named_row(number, row)
        if self.unique:
            wrong += [SAME_ID] * (name in self.ids)
            self.ids.add(name)
        texts = {}
        for key in ("system", "speaker", "emotion"):
            texts[key] = value = row.get(key)
            if not isinstance(value, str | None):
                wrong.append(f"its {key} is {printable(value)}, not a text")
                texts[key] = None
            elif value and (why := unfit(value)):
                wrong.append(f"its {key} {why}; remove it")
        wrong += persona_problems(texts["speaker"], texts["emotion"])
        self.problems += [Problem(name, what) for what in wrong]
        given = row.get("turns")
        turns = [self._turn(name, i, turn, row) for i, turn in enumerate(given, 1)] if isinstance(given, list) else []
        if not isinstance(given, list):
            what = f"its turns are {printable(given)}, not a list" if "turns" in row else "it has no turns"
            self.problems.append(Problem(name, what))
        else:
            self.problems += [Problem(name, what) for what in self._order(turns)]
        return DialogueRow(name, tuple(filter(None, turns)), **texts, source=row)

    def _turn(self, name: str, number: int, turn: Any, row: Row) -> DialogueTurn | None:
        """The turn, None where nothing can be made of it."""
        label = f"{name}#{number}"
        if not isinstance(turn, Mapping):
            self.problems.append(Problem(label, f"the turn is {printable(turn)}, not an object with a role"))
            return None
        own = {"tokenizer": row["tokenizer"]} if row.get("tokenizer") is not None else {}
        said = self._turns.read(number, {**own, **turn, "id": label})
        wrong = [problem.what for problem in self._turns.problems]
        self._turns.problems = []
        role, emotion = turn.get("role"), turn.get("emotion")
        if role == "system":
            wrong.append("its role is 'system': the system message is the row's `system`, not a turn")
        elif role not in ROLES:
            wrong.append(f"its role is {printable(role)}; there are {', '.join(ROLES)}")
        has_text = isinstance(turn.get("text"), str) and bool(turn["text"].strip())
        if role == "assistant" and not has_text and said.codes is None:
            wrong.append("the assistant's turn has no text")  # with codes the row of speech says so already
        if role == "user" and not has_text and turn.get("audio") is None:
            wrong.append("the user's turn has neither text nor audio")
        if emotion is not None and role == "user":
            wrong.append("it is the user's, and has an emotion: only the assistant's is taught, in its own turns")
        elif emotion is not None:
            wrong += persona_problems(emotion=emotion)
        self.problems += [Problem(label, what) for what in wrong]
        return DialogueTurn(str(role), said, emotion if isinstance(emotion, str) else None)

    def _order(self, turns: Sequence[DialogueTurn | None]) -> list[str]:
        """What is wrong with the turns together."""
        known = [turn for turn in turns if turn is not None and turn.role in ROLES]
        if len(known) < len(turns):
            return []  # said of the turn
        if not any(turn.role == "assistant" for turn in known):
            return ["it has no turn of the assistant: there is nothing to teach"]
        wrong = [] if known[-1].role == "assistant" else ["its last turn is the user's: nobody replies to it"]
        for i, turn in enumerate(known[1:], 2):
            if turn.role == known[i - 2].role:
                wrong.append(f"its turns {i - 1} and {i} are both the {turn.role}'s: they take turns")
        if known[0].role == "assistant" and known[0].emotion is not None:
            wrong.append("its first turn has an emotion, which no turn before it could ask for: give it to the row")
        if "audio" in self.needs and not any(turn.role == "user" and turn.said.clip is not None for turn in known):
            wrong.append("it has no audio of the user")
        if "codes" in self.needs and any(turn.role == "assistant" and turn.said.codes is None for turn in known):
            wrong.append("not all of the assistant's turns have codes: `covo-rl speech encode` makes them")
        return wrong
