"""Who replies, and how: the system message of a dialogue, written by one function in training and at inference.

    You are a helpful assistant. Reply in text and in speech.
    Emotion: joy.
    Speaker: anna.

A voice is named in the last line, so a voice that was learned from recordings alone can be asked for in any dialogue.
"""

from __future__ import annotations

#: what an assistant's voice can express
EMOTIONS = ("joy", "anger", "sadness", "fear", "disgust", "depression", "surprise")
#: the system messages of dialogues that bring none: they say whether the reply is heard
SPOKEN_SYSTEM = "You are a helpful assistant. Reply in text and in speech."
WRITTEN_SYSTEM = "You are a helpful assistant. Reply in text."


def persona_problems(speaker: str | None = None, emotion: str | None = None) -> list[str]:
    """Why no system message can name these; empty where one can."""
    problems = []
    if speaker is not None and not (speaker.strip() and speaker.splitlines() == [speaker]):
        problems.append(f"speaker {speaker!r:.60}: a name in one line, as it stands in the rows, is needed")
    if emotion is not None and emotion not in EMOTIONS:
        problems.append(f"emotion {emotion!r:.60}: there are {', '.join(EMOTIONS)}")
    return problems


def system_message(system: str | None = None, speaker: str | None = None, emotion: str | None = None) -> str:
    """A system message (None: SPOKEN_SYSTEM), the emotion and the speaker, each in a line of its own.

    >>> system_message("Be brief.", "anna", "joy")
    'Be brief.\\nEmotion: joy.\\nSpeaker: anna.'

    Raises:
        ValueError: an emotion that there is not, a speaker without a name or with more than one line.
    """
    if problems := persona_problems(speaker, emotion):
        raise ValueError("; ".join(problems))
    lines = [SPOKEN_SYSTEM if system is None else system]
    lines += [f"Emotion: {emotion}."] if emotion is not None else []
    lines += [f"Speaker: {speaker}."] if speaker is not None else []
    return "\n".join(line for line in lines if line)
