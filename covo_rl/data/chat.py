"""Rows that are conversations, ms-swift's and TRL's, as plain rows: one question with its clips, and one answer.

    ms-swift  `messages`: system?, user with `<audio>` where a clip is heard, assistant?; `audios`; `solution`
    TRL       `prompt`: messages whose content is a text or parts, `{"type": "audio", "audio": ...}`; `completion`

The system message becomes the row's own (`Example.system`). The answer is `answer` or `solution`, else what the
assistant says; of `<think>...</think><answer>...</answer>` the answer. Clips come first in a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from covo_rl.data.read import Row, printable
from covo_rl.data.rows import option_list
from covo_rl.data.schemas import SCHEMAS

TAG = "<audio>"
_CHATS = ("messages", "prompt")
_SOUNDS = ("audios", "audio")
_ANSWERS = ("answer", "solution")
_SYSTEM = ("system", "system_prompt")
_OTHERS = ("images", "videos", "tools")
_QUESTION = SCHEMAS["covo"].question
_TAGGED = re.compile(r"\s*(?:<think>.*</think>\s*)?<answer>(.*?)</answer>\s*", re.DOTALL)
#: Keys of a part that say where its sound is.
_SOURCES = ("audio", "path", "url", "audio_url")


class _Turn(NamedTuple):
    """A message: its text with TAG where a clip is heard, and the clips that its parts themselves hold."""

    role: str
    text: str
    sounds: tuple[Any, ...]


def is_chat(row: Row, columns: Mapping[str, str]) -> bool:
    """Whether the question of a row is in messages: it has no other, and a list of them."""
    has_question = "question" in columns or any(name in row for name in _QUESTION)
    return not has_question and any(_messages(row, name) is not None for name in _CHATS)


def plain_row(row: Row, columns: Mapping[str, str]) -> tuple[Row, str]:
    """(the row with `question`, `audio`, `answer` and `system_prompt` of its own, what to note or nothing).

    A field that `columns` maps is left to be read from its column.

    Raises:
        ValueError: what it is that one question and one answer cannot hold.
    """
    chats = [name for name in _CHATS if _messages(row, name) is not None]
    if len(chats) > 1:
        raise ValueError("it has messages and a prompt of messages; leave one out")
    if others := [name for name in _OTHERS if row.get(name)]:
        raise ValueError(f"it has {', '.join(others)}, which a prompt cannot hold here")
    completion = [_turn(message) for message in _messages(row, "completion") or ()]
    system, user, assistant = _roles([*(_turn(message) for message in _messages(row, chats[0]) or ()), *completion])
    question, note = _without_tags(user.text)
    names = (columns["audio"],) if "audio" in columns else _SOUNDS
    filled = [name for name in names if row.get(name) is not None]
    if len(filled) > 1:
        raise ValueError(f"it has {' and '.join(filled)}; leave one out, or say which: --columns audio={filled[0]}")
    field = filled[0] if filled else names[0]
    clips = _clips(user, row.get(field), field)
    plain = {name: value for name, value in row.items() if name not in (*chats, field, *_SYSTEM)}
    if completion:
        del plain["completion"]
    plain |= {"question": question, field if "audio" in columns else "audio": clips or None}
    own = [value for name in _SYSTEM if (value := row.get(name))] + ([system] if system else [])
    if len(own) > 1 or (own and "system_prompt" in columns):
        raise ValueError("it has more than one system message; leave one out")
    plain |= {"system_prompt": own[0]} if own else {}
    return plain | _answer(row, assistant, is_mapped=any(name.startswith("answer") for name in columns)), note


def _clips(user: _Turn, value: Any, field: str) -> list[Any]:
    """What the user's message hears, in order, of its own parts or of a field.

    Raises:
        ValueError: it has more or fewer places for audio.
    """
    listed = list(value) if isinstance(value, (list, tuple)) else [value] * (value is not None)
    if user.sounds and listed:
        raise ValueError(f"its messages hold sound, and so does {field}; leave one out")
    clips, tags = [*user.sounds, *listed], user.text.count(TAG)
    if tags != len(clips):
        what = f"its user message has {tags} places for audio ({TAG}), the row has {len(clips)} clips"
        raise ValueError(f"{what}; write one {TAG} for each clip, before the text")
    return clips


def _messages(row: Row, name: str) -> list[Any] | None:
    """The messages of a field, which a CSV holds as JSON or as Python writes a list; None where it has none."""
    value = option_list(row.get(name))
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, Mapping) for item in value):
        return None
    # an assistant that is still to speak says nothing
    return [item for item in value if (item.get("role"), item.get("content")) != ("assistant", None)]


def _turn(message: Mapping[str, Any]) -> _Turn:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError(f"a message has the role {printable(role)}; there are system, user, assistant")
    if isinstance(content, str):
        return _Turn(role, content, ())
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"the content of its {role} message is {printable(content)}, not a text or a list of parts")
    texts, sounds = [], []
    for part in content:
        text, sound = _part(part)
        texts.append(text)
        sounds += sound
    if sounds and "".join(texts).count(TAG) != len(sounds):
        raise ValueError(f"some places for audio in its {role} message hold sound, others do not")
    return _Turn(role, "".join(texts), tuple(sounds))


def _part(part: Any) -> tuple[str, list[Any]]:
    """(text, sound if it holds some) of a part of a message's content."""
    if isinstance(part, str):
        return part, []
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], []
    if kind not in ("audio", "audio_url"):
        raise ValueError(f"its messages hold {printable(part)}; text and audio are read")
    sources = [part[name] for name in _SOURCES if part.get(name) is not None]
    if len(sources) > 1:
        raise ValueError(f"a part of its messages says twice where its sound is: {printable(part)}")
    source = sources[0] if sources else None
    if isinstance(source, Mapping) and isinstance(source.get("url"), str):
        source = source["url"]
    return TAG, [] if source is None else [source]


def _roles(turns: Sequence[_Turn]) -> tuple[str, _Turn, str | None]:
    """(system message, the user's turn, what the assistant says or None).

    Raises:
        ValueError: other roles, several turns, another order, sound outside of the user's turn.
    """
    roles = [turn.role for turn in turns]
    if others := sorted({*roles} - {"system", "user", "assistant"}):
        raise ValueError(f"its messages have the role {', '.join(map(printable, others))}; there are system, user, "
                         "assistant")  # fmt: skip
    if roles.count("user") != 1 or roles.count("assistant") > 1 or roles.count("system") > 1:
        what = f"its conversation is {', '.join(roles)}: a row is one question and one answer"
        raise ValueError(f"{what}; make a row of each question, with what it needs of those before in its text")
    if roles != [role for role in ("system", "user", "assistant") if role in roles]:
        raise ValueError(f"its messages are in the order {', '.join(roles)}; write system, user, assistant")
    by_role = dict(zip(roles, turns, strict=True))
    for role in ("system", "assistant"):
        if role in by_role and TAG in by_role[role].text:
            raise ValueError(f"its {role} message has a place for audio; a question alone has sound")
    system, assistant = by_role.get("system"), by_role.get("assistant")
    return system.text.strip() if system else "", by_role["user"], assistant.text if assistant else None


def _without_tags(text: str) -> tuple[str, str]:
    """(the question, what to note) of a user's text.

    Raises:
        ValueError: a tag stands amid the text, where a prompt has no place for a clip.
    """
    bare = re.sub(rf"^(?:\s*{TAG})+\s*", "", text)
    if TAG not in bare:
        return bare, ""
    if TAG in (front := re.sub(rf"\s*(?:{TAG}\s*)+$", "", bare)):
        what = f"the place of a clip ({TAG}) is amid its text {printable(text)}: in a prompt the clips come first"
        raise ValueError(f"{what}; move the tags to the front and name the clips in words (the first recording)")
    return front, f"{TAG} stands behind the text; in a prompt the clips come first"


def _answer(row: Row, assistant: str | None, *, is_mapped: bool) -> Row:
    """The row's `answer`, and as `completion` what the assistant says where that is more than the answer.

    Raises:
        ValueError: two fields with different answers.
    """
    values = {name: row[name] for name in _ANSWERS if row.get(name) is not None and not is_mapped}
    if len({str(_bare(value)) for value in values.values()}) > 1:
        what = f"its answer and its solution differ: {' and '.join(map(printable, values.values()))}"
        raise ValueError(f"{what}; leave one out, or say which: --columns answer=solution")
    said = row.get("completion") if assistant is None else assistant
    value = _bare(next(iter(values.values()), said))
    result: Row = {} if is_mapped or value is None else {"answer": value}
    if assistant is not None and assistant != result.get("answer") and not isinstance(row.get("completion"), str):
        result["completion"] = assistant
    return result


def _bare(value: Any) -> Any:
    """The answer inside the tags of a reply; anything else as it is."""
    match = _TAGGED.fullmatch(value) if isinstance(value, str) else None
    return match[1].strip() if match else value


_OPTIONS = re.compile(r"(?:^|\s)\(?A[).:]\s*\S.*?\s\(?B[).:]\s*\S", re.DOTALL)


def lists_options(question: str) -> bool:
    """Whether a text seems to list options itself, `A. dog B. cat`."""
    return _OPTIONS.search(question) is not None
