"""What was said in replies: finished transcripts, what a transcriber hears of their audio, the turns of a live session.

hear_replies(inputs, engines) -> row's name -> a Said for each of its rounds
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from covo_rl.evaluate.speech.engines import SpeechEngines
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem, Word, round_count
from covo_rl.evaluate.speech.sets import KINDS
from covo_rl.rewards.replies import AnswerError
from covo_rl.speech.listeners import Heard
from covo_rl.types import Clip

T = TypeVar("T")
#: tasks that are scored by the times of words
TIMED = ("take_over", "backchannel", "overlap", "mtr_turns")
#: why most rows are missing
NO_REPLY = "no reply"
#: tasks in which a text that nobody heard is no reply
SOUND_ALONE = ("tts",)


@dataclass(frozen=True)
class Said:
    """One round's reply. `text` is what is scored, None where nothing was replied or heard, with the reason `why`.

    `source`: asr (a transcript of its audio), text (as written), events (turns of a live session). `unheard` says that
    its audio needs a transcriber that nobody named. `written` is the text that the model gave beside its audio,
    `thinking` its reasoning, `user_words` what the other side says where the judge is told.
    """

    text: str | None = None
    words: tuple[Word, ...] | None = None
    source: str = ""
    written: str | None = None
    audio: str | None = None
    thinking: str | None = None
    user_words: tuple[Word, ...] | None = None
    why: str = NO_REPLY
    unheard: bool = False


def sound_id(row: SpeechItem, place: int = 0, part: str = "") -> str:
    """The id under which engines are asked about a round: SUBSET/ID, of the second round on SUBSET/ID#2, and ~PART for
    what is no round's reply."""
    return row.name + f"#{place + 1}" * bool(place) + f"~{part}" * bool(part)


def is_spoken(row: SpeechItem) -> bool:
    """Whether its audio is what is scored, and the text a stand-in."""
    kind = KINDS[row.kind]
    return "--transcriber" in (*kind.needs, *kind.also)


def hear_replies(inputs: SpeechInputs, engines: SpeechEngines) -> dict[str, list[Said]]:
    """Every transcriber is asked once, about all the audio of its language that has no transcript."""
    said: dict[str, list[Said]] = {}
    waiting: dict[str, list[tuple[SpeechItem, int]]] = defaultdict(list)
    for row in inputs.rows:
        reply = inputs.reply(row) or GivenReply()
        said[row.name] = [_given(row, reply, place) for place in range(round_count(row))]
        for place, one in enumerate(said[row.name]):
            if one.unheard:
                waiting[spoken_language(row)].append((row, place))
    for language, places in waiting.items():
        if (engine := engines.transcriber(language)) is None:
            why = engines.missing(["transcriber"], language)["transcriber"]
            for row, place in places:
                said[row.name][place] = replace(said[row.name][place], why=why)
            continue
        sounds = [Heard(sound_id(row, place), Clip(path=said[row.name][place].audio), language)
                  for row, place in places]  # fmt: skip
        for (row, place), answer in zip(places, engine.hear(sounds), strict=True):
            said[row.name][place] = _heard(row, said[row.name][place], answer)
    _hear_users([row for row in inputs.rows if KINDS[row.kind].task == "overlap"], said, engines)
    return said


def _hear_users(rows: Sequence[SpeechItem], said: dict[str, list[Said]], engines: SpeechEngines) -> None:
    """What stands in the input of rows in which the model spoke, where somebody can hear it."""
    for language in dict.fromkeys(map(spoken_language, rows)):
        own = [row for row in rows if spoken_language(row) == language]
        own = [row for row in own if said[row.name][0].words and said[row.name][0].user_words is None]
        if (engine := engines.transcriber(language)) is None:
            continue
        sounds = [Heard(sound_id(row, part="input"), row.clips[0], language) for row in own]
        for row, answer in zip(own, engine.hear(sounds), strict=True):
            if isinstance(answer, Mapping) and answer.get("words") is not None:
                words = tuple(Word(**word) for word in answer["words"])
                said[row.name][0] = replace(said[row.name][0], user_words=words)


def spoken_language(row: SpeechItem) -> str:
    """What a transcriber is told: the row's language, "" where it is not known."""
    return "" if row.language == "multi" else row.language


def at(values: Sequence[T | None], place: int) -> T | None:
    """The entry of a round, None where there is none."""
    return values[place] if place < len(values) else None


def _given(row: SpeechItem, reply: GivenReply, place: int) -> Said:
    """What the reply holds by itself; `unheard` where that is not enough, and there is audio."""
    task = KINDS[row.kind].task
    written, audio = at(reply.texts, place), at(reply.audio, place)
    heard, words = at(reply.asr_texts, place), at(reply.words, place)
    one = Said(written=written, audio=audio, thinking=reply.thinking)
    if task in TIMED:
        if words is None and (turns := channel_turns(reply, "model")) is not None:
            words = tuple(word for turn in turns for word in turn_words(turn))
            user = tuple(word for turn in channel_turns(reply, "user") or () for word in turn_words(turn))
            one = replace(one, user_words=user if any(word.text for word in user) else None)
            return replace(one, text=" ".join(word.text for word in words), words=words, source="events", why="")
        if words is not None or reply.segments is not None:
            return replace(
                one, text=heard or joined_words(words or (), row.language), words=words, source="asr", why=""
            )
        return replace(one, unheard=audio is not None, why="no reply with times")
    if heard is None and words is not None:
        heard = joined_words(words, row.language)
    if "--audio-judge" in KINDS[row.kind].needs:  # who judges hears it: no text is needed
        text = written if heard is None else heard
        source = "" if text is None else "text" if heard is None else "asr"
        return replace(one, text=text, source=source, why="no audio" if audio is None else "")
    if not is_spoken(row) and written is not None:
        return replace(one, text=written, source="text", why="")
    if heard is not None:
        return replace(one, text=heard, words=words, source="asr", why="")
    if audio is not None:
        return replace(one, unheard=True, why="its audio was not heard")
    if written is None or task in SOUND_ALONE:
        return replace(one, why=NO_REPLY if written is None else "text alone, and no audio")
    return replace(one, text=written, source="text", why="")


def _heard(row: SpeechItem, one: Said, answer: Any) -> Said:
    if isinstance(answer, AnswerError):
        return replace(one, why=str(answer), unheard=False)
    words = None if answer.get("words") is None else tuple(Word(**word) for word in answer["words"])
    if words is None and KINDS[row.kind].task in TIMED and answer["text"].strip():
        return replace(one, why="the transcriber tells no times of words", unheard=False)
    timed = words if words is not None else () if KINDS[row.kind].task in TIMED else None
    return replace(one, text=answer["text"], words=timed, source="asr", why="", unheard=False)


def joined_words(words: Sequence[Word], language: str) -> str:
    """The text of words."""
    return ("" if language == "zh" else " ").join(word.text.strip() for word in words)


# -- turns of a live session -----------------------------------------------------------------------------------------


def channel_turns(reply: GivenReply, channel: str) -> list[Mapping[str, Any]] | None:
    """Those of one side, in time; None where the reply has no events, or none of the user's: a session knows only its
    own turns."""
    if reply.turns is None:
        return None
    turns = sorted((turn for turn in reply.turns if turn["channel"] == channel), key=lambda turn: float(turn["start"]))
    return turns if turns or channel == "model" else None


def turn_words(turn: Mapping[str, Any]) -> list[Word]:
    """The words of a turn, as long as one another; a turn without its text is one word."""
    texts = str(turn.get("text") or "").split() or [""]
    start, end = float(turn["start"]), float(turn["end"])
    step = (end - start) / len(texts)
    return [Word(text, start + i * step, start + (i + 1) * step) for i, text in enumerate(texts)]
