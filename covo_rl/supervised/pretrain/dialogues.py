"""Dialogues as documents, in ChatML as the processor's template writes it, but for the newline after the last turn.

    system | user: text, a recording (B S.. E) or both | assistant: text, or text and codes 5:15 | user | assistant ...

Every turn of the assistant is a response and taught with the end of its turn; the rest is context. A *pseudo-dialogue*
is a recording of a voice made into a reply: its text is context too, and only codes and the end of the turn are taught,
so a voice is learned without a word of what it says being taught to the mind.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from covo_rl.models.covo_audio.persona import WRITTEN_SYSTEM, system_message
from covo_rl.models.covo_audio.processing import IGNORE, interleave, make_labels
from covo_rl.speech.grid import check_codes
from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain.builder import heard
from covo_rl.supervised.pretrain.dialogue_rows import DialogueRow, DialogueTurn
from covo_rl.supervised.pretrain.document import BuildOptions, Document, SkippedError, Vocabulary
from covo_rl.supervised.pretrain.fragments import Fragment
from covo_rl.types import Supervise

#: what the user of a pseudo-dialogue says
QUERIES = (
    "Please say the next line.", "Read the next line aloud.", "What is the next line?", "Say the line, please.",
    "Go on, I am listening.", "Please speak now.", "It is your turn to speak.", "Let me hear the next sentence.",
)  # fmt: skip
#: what asks for the emotion of one turn
ASKED_EMOTION = "Reply with {emotion}."
LONGEST_TURN = 750  # codes of a recording that is heard: 30 s, one window of the encoder

NO_CODES = "no codes in a turn of the assistant"
NO_AUDIO = "no audio of the user"
NO_TEXT = "no text in a turn of the user"


def build_pseudo_dialogue(
    unit: Sequence[SpeechRow], vocabulary: Vocabulary, rng: random.Random, options: BuildOptions
) -> Document:
    """A recording with its codes -> system with its speaker | a query | text and codes. The text is not taught, unless
    `options.text_loss`; `options.query` none leaves the user's turn out.

    Raises:
        SkippedError: no text, no codes, or a speaker or an emotion that no system message can name.
        CodeError: a code that the model has not.
    """
    (row,) = unit
    writer = _Writer(vocabulary)
    writer.turn("system", _system(None, row.speaker, row.source.get("emotion"), row.id))
    if options.query == "text":
        writer.turn("user", rng.choice(QUERIES))
    writer.reply(row, spoken=True, supervise="all" if options.text_loss else "spoken")
    return writer.document()


def build_dialogue(row: DialogueRow, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    """ac>t|ad: recordings of the user, replies in text and codes.

    Raises:
        SkippedError: no recording of the user, or a reply without codes.
    """
    return write_dialogue(row, vocabulary, hear=True, speak=True)


def build_general(row: DialogueRow, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    """One of t>t, t>ad, ac>t, ac>t|ad, drawn from those for which the row has enough."""
    ways = [(hear, speak) for hear in (False, True) for speak in (False, True) if not missing_parts(row, hear, speak)]
    hear, speak = rng.choice(ways)
    return write_dialogue(row, vocabulary, hear=hear, speak=speak)


def build_understanding(
    row: DialogueRow, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions
) -> Document:
    """ac and text > t: a recording and what is asked about it, both in the user's turn; the reply is text.

    Raises:
        SkippedError: no recording of the user, or none with a text beside it.
    """
    return write_dialogue(row, vocabulary, hear=True, speak=False, asked=True)


def missing_parts(row: DialogueRow, hear: bool, speak: bool, asked: bool = False) -> str:
    """What the row lacks to be written so, one reason; empty where nothing."""
    users = [turn.said for turn in row.turns if turn.role == "user"]
    replies = [turn.said for turn in row.turns if turn.role == "assistant"]
    heard = [said for said in users if said.clip is not None]
    if speak and any(said.codes is None for said in replies):
        return NO_CODES
    if hear and not heard:
        return NO_AUDIO
    if asked and not any(said.text.strip() for said in heard):
        return "no text beside the audio of the user"
    return NO_TEXT if not hear and any(not said.text.strip() for said in users) else ""


def write_dialogue(
    row: DialogueRow, vocabulary: Vocabulary, *, hear: bool, speak: bool, asked: bool = False
) -> Document:
    """The dialogue as a document. `hear`: turns of the user that have a recording are heard, and read else.

    `asked`: the text of a turn that is heard is written after it (what is asked about it), and left out else (what is
    said in it). `speak`: replies are text and codes, 5:15, and text alone else; the speaker is named if they are heard.

    Raises:
        SkippedError: the row lacks something for this, or a recording is too long.
        AudioError: a recording that cannot be read.
        CodeError: a code that the model has not.
    """
    if reason := missing_parts(row, hear, speak, asked):
        raise SkippedError(reason, row.id)
    writer = _Writer(vocabulary)
    system = row.system if speak or row.system is not None else WRITTEN_SYSTEM
    writer.turn("system", _system(system, row.speaker if speak else None, row.emotion, row.id))
    for turn, following in zip(row.turns, [*row.turns[1:], None], strict=True):
        if turn.role == "assistant":
            writer.reply(turn.said, spoken=speak, supervise="all")
        else:
            writer.query(turn, following.emotion if following else None, hear, asked)
    return writer.document()


def _system(system: str | None, speaker: str | None, emotion: str | None, row: str) -> str:
    try:
        return system_message(system, speaker, emotion)
    except ValueError as error:  # of a row that was not read for a task with a voice
        raise SkippedError(str(error), row) from error


class _Writer:
    """Ids and labels of a dialogue, turn by turn."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.clips: list[tuple[str, int, int]] = []

    def turn(self, role: str, text: str) -> None:
        """Context in text alone; of a system message without text nothing is written."""
        if text or role != "system":
            self._add([*self._open(role, text), self.vocabulary.turn_end])

    def query(self, turn: DialogueTurn, emotion: str | None, hear: bool, asked: bool) -> None:
        """A turn of the user; `emotion` is that of the reply."""
        said, ask = turn.said, "" if emotion is None else ASKED_EMOTION.format(emotion=emotion)
        sounds = hear and said.clip is not None
        text = "\n".join(part for part in (said.text if asked or not sounds else "", ask) if part)
        if not sounds:
            return self.turn("user", text)
        length = said.code_count()
        if length > LONGEST_TURN:
            raise SkippedError("a turn of more than 30 s", said.id)
        sound = heard(Fragment("", 0, length, said.id), self.vocabulary)
        self.clips.append((said.id, 0, length))
        written = self.vocabulary.text(text) if text else []
        return self._add([*self._open("user"), *sound, *written, self.vocabulary.turn_end])

    def reply(self, said: SpeechRow, *, spoken: bool, supervise: Supervise) -> None:
        """A turn of the assistant. Its text is tokenized by itself: the model begins after `assistant` and newline."""
        if not said.text.strip():
            raise SkippedError("no text", said.id)
        if spoken and (said.codes is None or not len(said.codes)):
            raise SkippedError("no codes", said.id)
        vocabulary = self.vocabulary
        codes = said.codes.tolist() if spoken and said.codes is not None else []
        check_codes([codes], vocabulary.codes, [said.id])
        response = [*interleave(vocabulary.text(said.text), codes, vocabulary.first_code), vocabulary.turn_end]
        taught = make_labels(
            torch.tensor([response]), [0], vocabulary.first_code, supervise=supervise, end_id=vocabulary.turn_end
        )
        self._add(self._open("assistant"))
        self._add(response, taught[0].tolist())

    def document(self) -> Document:
        return Document(self.ids, self.labels, tuple(self.clips))

    def _open(self, role: str, text: str = "") -> list[int]:
        """The head of a turn. Its newline and the text after it become ids together, as in the template."""
        between = self.vocabulary.text("\n") if self.ids else []
        return [*between, self.vocabulary.turn_start, *self.vocabulary.text(f"{role}\n{text}")]

    def _add(self, ids: Sequence[int], labels: Sequence[int] | None = None) -> None:
        self.ids += ids
        self.labels += [IGNORE] * len(ids) if labels is None else labels
