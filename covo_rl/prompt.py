"""A row becomes a prompt, and a completion becomes its parts: one grammar for training, rewards and evaluation.

    example -> messages -> text with audio slots -> ids          completion -> think + answer, or what is wrong

The grammar is anchored over the whole completion:

    whitespace? <think> reasoning </think> whitespace? <answer> answer </answer> whitespace?

Neither block may be empty and no tag may appear inside one. Tags are lower-case, as the instruction writes them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from covo_rl.types import Example, Prompt, UserError, visible

if TYPE_CHECKING:
    import numpy as np

    from covo_rl.audio import ClipStore
    from covo_rl.config import PromptConfig

TAGS = ("think", "answer")
#: a noncharacter of Unicode: in a rendered prompt it parts what would read as a special token (models/text.py)
CUT = "\ufdd0"
#: another, which holds the place of an earlier reply while a conversation is rendered
SAID = "\ufdd1"
#: what chat templates commonly read as their own, where the tokenizer is not known; in two halves
CONTROL = re.compile(
    r"(<)([|\uff5c][^<>\s]{1,60}[|\uff5c]>|/?s>|/?tool_(?:call|response)s?>|(?:start|end)_of_turn>)|(\[)(/?(?:INST|SYSTEM_PROMPT)\])"
)
_TAG = re.compile(r"<(/?)(think|answer)>")
#: what no reader sees: control and format characters, spaces, marks without a letter, and blanks that count as letters
_UNSEEN_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn", "Me", "Mc"))
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"
_SHAPE = [("", "think"), ("/", "think"), ("", "answer"), ("/", "answer")]


class PromptFamily(Protocol):
    """What a prompt needs of a model family (models/base.py)."""

    @property
    def audio_token_id(self) -> int: ...

    def clip_slots(self, waveform: np.ndarray, sampling_rate: int) -> int: ...

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str: ...  # with CUT in special tokens that are text

    def tokenize(self, text: str, slots: Sequence[int]) -> list[int]: ...


class PromptError(UserError, ValueError):
    """A row cannot become a prompt; the message names the row."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the grammar finds. `think` and `answer` are stripped, and None where not exactly one block can be read.

    A block is read even if something else is wrong (text outside, wrong order), so that an answer can be graded
    apart from its format. An answer inside the reasoning is not an answer. `problems` is empty iff all is well.
    """

    think: str | None
    answer: str | None
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """The whole completion follows the grammar."""
        return not self.problems


def parse(text: str, stop_reason: str = "stop") -> Parsed:
    """Read a completion. Linear in its length; never raises on any string.

    >>> parse("<think>It rings.</think><answer>bell</answer>")
    Parsed(think='It rings.', answer='bell', problems=())
    >>> parse("<think>It rings.</think> bell").problems
    ('no <answer> block', "text outside the blocks: 'bell'")
    """
    tags = list(_TAG.finditer(text))
    spans = {name: _span(tags, name) for name in TAGS}
    nested, outside = _walk(text, tags)
    problems: list[str] = []
    if [(tag[1], tag[2]) for tag in tags] != _SHAPE:
        problems += [problem for name in TAGS for problem in _block_problems(tags, name)]
        problems += _order_problems(nested, spans["think"], spans["answer"])
    if outside:
        problems.append(f"text outside the blocks: {outside if len(outside) <= 40 else outside[:37] + '...'!r}")
    contents = {name: None if span is None else text[slice(*span)].strip() for name, span in spans.items()}
    for name, content in contents.items():
        if content is not None and not _is_visible(content):
            contents[name] = ""
            problems.append(f"the <{name}> block is empty")
        elif content and (control := CONTROL.search(content)):
            problems.append(f"the <{name}> block holds the token {control[0]}")
    if stop_reason == "length":
        problems.append("cut by the length limit")
    return Parsed(contents["think"], None if nested else contents["answer"], tuple(problems))


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(char) not in _UNSEEN_CATEGORIES and char not in _BLANKS for char in set(text))


def _span(tags: Sequence[re.Match[str]], name: str) -> tuple[int, int] | None:
    """Content range of the one block of this name, or None."""
    opened = [tag.end() for tag in tags if tag[0] == f"<{name}>"]
    closed = [tag.start() for tag in tags if tag[0] == f"</{name}>"]
    return (opened[0], closed[0]) if len(opened) == len(closed) == 1 and opened[0] <= closed[0] else None


def _walk(text: str, tags: Sequence[re.Match[str]]) -> tuple[list[str], str]:
    """Blocks that open inside the other one, and the text outside of all. Tags open and close by name."""
    depth: dict[str, int] = dict.fromkeys(TAGS, 0)
    closed = {name: max((tag.start() for tag in tags if tag[0] == f"</{name}>"), default=-1) for name in TAGS}
    level, last, nested, outside = 0, 0, set(), []
    for tag in tags:
        step, name = -1 if tag[1] else 1, tag[2]
        if not level:
            outside.append(text[last : tag.start()].strip())
        other = TAGS[name == TAGS[0]]
        # opened twice and closed once is closed, unless another end follows
        if step > 0 and depth[other] and not -1 < closed[other] < tag.start():
            nested.add(name)
        depth[name], level, last = max(depth[name] + step, 0), max(level + step, 0), tag.end()
    if not level:
        outside.append(text[last:].strip())
    return [name for name in reversed(TAGS) if name in nested], " ".join(filter(None, outside))


def _block_problems(tags: Sequence[re.Match[str]], name: str) -> list[str]:
    opens = [not tag[1] for tag in tags if tag[2] == name]
    if not opens:
        return [f"no <{name}> block"]
    opened = sum(opens)
    closed = len(opens) - opened
    rules = [
        (opens[:2] == [True, True], f"<{name}> is nested in <{name}>"),
        (opened > 1, f"<{name}> is repeated: {opened} times"),
        (closed > max(opened, 1), f"</{name}> is repeated: {closed} times"),
        (opened > closed, f"<{name}> is not closed"),
        (opened <= closed and not opens[0], f"</{name}> comes without <{name}> before it"),
    ]
    return [problem for applies, problem in rules if applies]


def _order_problems(nested: Sequence[str], think: tuple[int, int] | None, answer: tuple[int, int] | None) -> list[str]:
    other = {"think": "answer", "answer": "think"}
    if nested or think is None or answer is None:
        return [f"<{name}> is nested in <{other[name]}>" for name in nested]
    if answer[0] < think[0]:
        return ["out of order: <answer> comes before <think>"]
    return ["the blocks overlap"] if answer[0] < think[1] < answer[1] else []


def reference_completion(think: str, answer: str) -> str:
    """The inverse of `parse`: what a perfect completion looks like.

    >>> reference_completion("It rings.", "bell")
    '<think>It rings.</think><answer>bell</answer>'

    Raises:
        ValueError: a part is empty or holds a tag, so that no completion could be parsed back to it.
    """
    text = f"<think>{think}</think><answer>{answer}</answer>"
    if problems := parse(text).problems:
        raise ValueError(f"no completion can hold think={think!r} and answer={answer!r}: {'; '.join(problems)}")
    return text


def option_letter(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA: the label under which an option is listed."""
    letters = ""
    while index >= 0:
        letters = chr(ord("A") + index % 26) + letters
        index = index // 26 - 1
    return letters


def list_choices(choices: Sequence[str], style: str) -> str:
    """The options as the prompt shows them: `letters` (A. one per line), `lines`, or `inline` (one sentence)."""
    if style == "letters":
        return "\n".join(f"{option_letter(i)}. {choice}" for i, choice in enumerate(choices))
    if style == "lines":
        return "\n".join(choices)
    if style == "inline":
        return f"Choose one of: {'; '.join(choices)}."
    raise PromptError(f"choice_style {style!r}: there are letters, lines, inline")


def messages(example: Example, config: PromptConfig) -> list[dict[str, Any]]:
    """[system?], what was said before, user: one {"type": "audio"} per clip of the question, then the question, its
    options and the instruction.

    Raises:
        PromptError: the question is not to be written, and there is no clip that could ask.
    """
    lines = [example.question.strip()] if config.written_question else []
    if example.choices and config.written_question:
        lines.append(list_choices(example.choices, config.choice_style))
    if config.instruction:
        lines.append(config.instruction)
    content: list[dict[str, Any]] = [{"type": "audio"} for _ in example.clips[_clip_count(example.history) :]]
    if text := "\n".join(line for line in lines if line):
        content.append({"type": "text", "text": text})
    if not content:
        row = f"row {visible(example.id)}"
        raise PromptError(f"{row}: it has no audio, and written_question false leaves nothing to ask")
    chat: list[dict[str, Any]] = []
    if system := example.system or config.system_prompt:
        chat.append({"role": "system", "content": [{"type": "text", "text": system}]})
    return [*chat, *map(dict, example.history), {"role": "user", "content": content}]


def _clip_count(chat: Iterable[Mapping[str, Any]]) -> int:
    return sum(part["type"] == "audio" for message in chat for part in message["content"])


def position_limit(config: Any) -> int | None:
    """Positions that a decoder of this configuration was made for, None where it does not say.

    Of longrope those before its angles change: for all rows of a pass at once, and not for keys that are in memory.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    scaled = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if limit and (original := scaled.get("original_max_position_embeddings")):
        if scaled.get("rope_type") == "longrope":
            return int(original)
        limit = max(limit, int(original * (scaled.get("factor") or 1)))
    return limit


def length_problem(name: str, prompt: int, completion: int, limit: int | None) -> list[str]:
    """What is wrong with so many positions in the row `name`; empty where they fit."""
    if limit is None or prompt + completion <= limit:
        return []
    return [
        f"row {visible(name)}: {prompt} positions of the prompt and up to {completion} of the completion are "
        f"{prompt + completion}, the model takes {limit} (max_position_embeddings): shorten the audio or the question, "
        "or lower max_completion_length"
    ]


def written_texts(examples: Iterable[Example], config: PromptConfig) -> Iterator[tuple[str, str]]:
    """(row id, what the row says in its prompt), and the same of the options that every prompt has."""
    yield "prompt options", f"{config.system_prompt or ''}\n{config.instruction}"
    yield from ((example.id, "\n".join(example.texts)) for example in examples)


_SLOTS: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def clip_slots(key: str, family: PromptFamily, clips: ClipStore) -> int:
    """Audio positions that a clip fills in this family, remembered by content."""
    slots = _SLOTS.setdefault(family, {})
    if key not in slots:
        slots[key] = family.clip_slots(*clips.waveform(key))
    return slots[key]


def build_prompt(example: Example, family: PromptFamily, clips: ClipStore, config: PromptConfig) -> Prompt:
    """Render the chat template, expand one audio token per clip to as many as the clip has features.

    Raises:
        PromptError: a clip cannot be read, or the ids do not hold exactly the expected audio slots.
    """
    return chat_prompt(example, messages(example, config), family, clips)


def chat_prompt(example: Example, chat: Sequence[Mapping[str, Any]], family: PromptFamily, clips: ClipStore) -> Prompt:
    """The prompt of a conversation, whose audio is, in order, the clips of `example`. A reply of it that has `ids` is
    written as those. Raises as `build_prompt`."""
    try:
        keys = tuple(clips.key(clip) for clip in example.clips)
        slots = tuple(clip_slots(key, family, clips) for key in keys)
        plain = [{name: value for name, value in message.items() if name != "ids"} for message in chat]
        text = family.render(plain)
        sampled = any("ids" in message for message in chat)
        ids = _chat_ids(chat, family, slots) if sampled else tuple(family.tokenize(text, slots))
    except ValueError as error:  # AudioError is one
        raise PromptError(visible(f"row {example.id}: {error}")) from error
    row = f"row {visible(example.id)}"
    if any(count < 1 for count in slots):
        raise PromptError(f"{row}: a clip fills no audio slot ({slots}); it is too short for this model")
    if (positions := ids.count(family.audio_token_id)) != sum(slots):
        raise PromptError(
            f"{row}: the prompt has {positions} audio positions, its {len(keys)} clips need {sum(slots)}; "
            "does the question or the template hold an audio token of its own?"
        )
    return Prompt(example, tuple(plain), text.replace(CUT, ""), ids, keys, slots)


def _chat_ids(chat: Sequence[Mapping[str, Any]], family: PromptFamily, slots: Sequence[int]) -> tuple[int, ...]:
    """The ids of a conversation, some of whose replies stand as they were sampled, where the template writes a text."""
    marked = [{"role": m["role"], "content": [{"type": "text", "text": SAID}]} if "ids" in m else m for m in chat]
    replies = [place for place, message in enumerate(chat) if "ids" in message]
    pieces = family.render(marked).split(SAID)
    if len(pieces) != len(replies) + 1:
        raise ValueError(f"the chat template writes {len(pieces) - 1} of {len(replies)} earlier replies")
    ids: list[int] = []
    left = iter(slots)
    for piece, start, end in zip(pieces, [0, *replies], [*replies, len(chat)], strict=True):
        ids += family.tokenize(piece, [next(left) for _ in range(_clip_count(chat[start:end]))])
        ids += chat[end]["ids"] if end < len(chat) else ()
    return tuple(ids)
