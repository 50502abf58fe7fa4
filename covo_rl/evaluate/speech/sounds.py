"""What scorer models make of replies: naturalness, emotion, where somebody speaks, vectors of texts.

ask_scorers(inputs, said, engines)      name of the model -> id (hearing.sound_id) -> answer, or AnswerError
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from covo_rl.evaluate.speech.engines import SpeechEngines
from covo_rl.evaluate.speech.hearing import Said, channel_turns, sound_id, spoken_language
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem
from covo_rl.evaluate.speech.sets import KINDS
from covo_rl.rewards.replies import AnswerError
from covo_rl.speech.listeners import Heard
from covo_rl.types import Clip

Sounds = dict[str, dict[str, Any]]


def ask_scorers(inputs: SpeechInputs, said: Mapping[str, Sequence[Said]], engines: SpeechEngines) -> Sounds:
    """Each model that is there is asked once, about everything that it can add to."""
    answers: Sounds = {}
    for name, engine in engines.scorer_models.items():
        sounds = [
            sound
            for row in inputs.rows
            for sound in _ASKED[name](row, said[row.name], inputs.reply(row) or GivenReply())
        ]
        answers[name] = dict(zip((sound.id for sound in sounds), engine.hear(sounds), strict=True))
    return answers


def _replies(row: SpeechItem, said: Sequence[Said]) -> Iterator[Heard]:
    for place, one in enumerate(said):
        if one.audio is not None:
            yield Heard(sound_id(row, place), Clip(path=one.audio), spoken_language(row))


def _natural(row: SpeechItem, said: Sequence[Said], reply: GivenReply) -> Iterator[Heard]:
    if "--scorer-model utmos" in KINDS[row.kind].also:
        yield from _replies(row, said)


def _emotional(row: SpeechItem, said: Sequence[Said], reply: GivenReply) -> Iterator[Heard]:
    if row.kind == "uro_ge":
        yield from _replies(row, said)


def _active(row: SpeechItem, said: Sequence[Said], reply: GivenReply) -> Iterator[Heard]:
    """The model's side, and in v1.5 the user's, each where no turns of a session tell it."""
    if "--scorer-model vad" not in KINDS[row.kind].needs or (reply.turns is None and said[0].audio is None):
        return
    if channel_turns(reply, "model") is None:
        yield from _replies(row, said)
    if KINDS[row.kind].task == "overlap" and channel_turns(reply, "user") is None:
        yield Heard(sound_id(row, part="input"), row.clips[0], spoken_language(row))


def _embedded(row: SpeechItem, said: Sequence[Said], reply: GivenReply) -> Iterator[Heard]:
    if KINDS[row.kind].task == "closed" and said[0].text:
        yield Heard(sound_id(row), text=said[0].text)
        for place, choice in enumerate(row.choices):
            yield Heard(sound_id(row, part=f"choice{place + 1}"), text=choice)


_ASKED: dict[str, Callable[[SpeechItem, Sequence[Said], GivenReply], Iterator[Heard]]] = {
    "utmos": _natural, "emotion": _emotional, "vad": _active, "embed": _embedded,
}  # fmt: skip


# -- what the answers mean for a row ---------------------------------------------------------------------------------


def emotion_probability(row: SpeechItem, answer: Any) -> float | str:
    """Of the row's emotion, or why there is none. Labels may be in two languages, `生气/angry`; a lone number is the
    probability itself."""
    wanted = str(row.columns.get("emotion") or "").casefold()
    if answer is None or isinstance(answer, AnswerError):
        return str(answer or "no audio")
    if not isinstance(answer["score"], Mapping):
        found = float(answer["score"])
    else:
        names = {p.strip().casefold(): value for label, value in answer["score"].items() for p in label.split("/")}
        if wanted not in names:
            return f"the row asks for {wanted!r}, the model knows {', '.join(answer['score'])}"
        found = float(names[wanted])
    return found if 0 <= found <= 1 else f"the model gives {wanted!r} {found:g}, which is no probability"


def activity(row: SpeechItem, reply: GivenReply, answers: Mapping[str, Any], side: str) -> list[list[float]] | str:
    """[start, end] of where a side speaks, from turns or from the model's answers; or why it is not known."""
    if (turns := channel_turns(reply, side)) is not None:
        return [[float(turn["start"]), float(turn["end"])] for turn in turns]
    answer = answers.get(sound_id(row, part="input" if side == "user" else ""))
    if answer is None or isinstance(answer, AnswerError):
        return str(answer or "no audio")
    if any(segment["end"] is None for segment in answer["segments"]):
        return "a segment has no end"
    return [[segment["start"], segment["end"]] for segment in answer["segments"]]


def nearest_choice(row: SpeechItem, answers: Mapping[str, Any]) -> str | None:
    """The option whose vector has the largest cosine with the reply's, the first of equal ones; None without both."""
    vectors = [answers.get(sound_id(row)), *(answers.get(sound_id(row, part=f"choice{i + 1}"))
                                             for i in range(len(row.choices)))]  # fmt: skip
    if any(not isinstance(vector, Mapping) or not any(vector["vector"]) for vector in vectors):
        return None
    reply, *choices = (vector["vector"] for vector in vectors if vector is not None)
    if any(len(choice) != len(reply) for choice in choices):
        return None

    def closeness(choice: Sequence[float]) -> float:
        largest = max(map(abs, choice))  # its length plays no part, and would overflow squared
        scaled = [value / largest for value in choice]
        return sum(a * b for a, b in zip(reply, scaled, strict=True)) / sum(b * b for b in scaled) ** 0.5

    largest = max(map(abs, reply))
    reply = [value / largest for value in reply]
    return row.choices[max(range(len(choices)), key=lambda i: closeness(choices[i]))]
