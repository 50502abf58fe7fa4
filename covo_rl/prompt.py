"""A row becomes a prompt, and a completion becomes its parts: one grammar for training, rewards and evaluation.

    example -> messages -> text with audio slots -> ids          completion -> think + answer, or what is wrong

The grammar is anchored over the whole completion:

    whitespace? <think> reasoning </think> whitespace? <answer> answer </answer> whitespace?

Neither block may be empty and no tag may appear inside one. Tags are lower-case, as the instruction writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from covo_rl.types import Example, Prompt

if TYPE_CHECKING:
    import numpy as np

    from covo_rl.audio import ClipStore
    from covo_rl.config import PromptConfig

TAGS = ("think", "answer")
_TAG = re.compile(r"<(/?)(think|answer)>")
_SHAPE = ["<think>", "</think>", "<answer>", "</answer>"]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class PromptFamily(Protocol):
    """What a prompt needs of a model family (models/base.py)."""

    @property
    def audio_token_id(self) -> int: ...

    def clip_slots(self, waveform: np.ndarray, sampling_rate: int) -> int: ...

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str: ...

    def tokenize(self, text: str, slots: Sequence[int]) -> list[int]: ...


class PromptError(ValueError):
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
    tags = [(match.start(), match.end(), match.group()) for match in _TAG.finditer(text)]
    spans = {name: _span(tags, name) for name in TAGS}
    think, answer = spans["think"], spans["answer"]
    problems: list[str] = []
    if [tag for _, _, tag in tags] == _SHAPE:
        nested = False
    else:
        nested = _inside(tags, "answer", "think")
        for name in TAGS:
            problems += _block_problems(tags, name)
        problems += _order_problems(tags, think, answer)
    problems += _outside_problems(text, tags)
    contents: dict[str, str | None] = {}
    for name, span in spans.items():
        content = None if span is None else text[span[0] : span[1]].strip()
        if content == "":
            problems.append(f"the <{name}> block is empty")
        contents[name] = content
    if nested or _inside(tags, "think", "answer"):
        contents["answer"] = None
    if stop_reason == "length":
        problems.append("cut by the length limit")
    return Parsed(contents["think"], contents["answer"], tuple(problems))


def _span(tags: Sequence[tuple[int, int, str]], name: str) -> tuple[int, int] | None:
    """Content range of the one block of this name, or None."""
    opened = [end for _, end, tag in tags if tag == f"<{name}>"]
    closed = [start for start, _, tag in tags if tag == f"</{name}>"]
    if len(opened) == len(closed) == 1 and opened[0] <= closed[0]:
        return opened[0], closed[0]
    return None


def _inside(tags: Sequence[tuple[int, int, str]], inner: str, outer: str) -> bool:
    """Does an opening tag of `inner` come while `outer` is open?"""
    depth = 0
    for _, _, tag in tags:
        if tag == f"<{outer}>":
            depth += 1
        elif tag == f"</{outer}>":
            depth = max(depth - 1, 0)
        elif tag == f"<{inner}>" and depth:
            return True
    return False


def _block_problems(tags: Sequence[tuple[int, int, str]], name: str) -> list[str]:
    mine = [tag for _, _, tag in tags if tag in (f"<{name}>", f"</{name}>")]
    opened, closed = mine.count(f"<{name}>"), mine.count(f"</{name}>")
    if not mine:
        return [f"no <{name}> block"]
    problems = []
    if opened > 1 and mine[:2] == [f"<{name}>"] * 2:
        problems.append(f"<{name}> is nested in <{name}>")
    if opened > 1:
        problems.append(f"<{name}> is repeated: {opened} times")
    if closed > 1 and closed > opened:
        problems.append(f"</{name}> is repeated: {closed} times")
    if opened > closed:
        problems.append(f"<{name}> is not closed")
    elif not opened or mine[0] == f"</{name}>":
        problems.append(f"</{name}> comes without <{name}> before it")
    return problems


def _order_problems(
    tags: Sequence[tuple[int, int, str]], think: tuple[int, int] | None, answer: tuple[int, int] | None
) -> list[str]:
    problems = []
    if _inside(tags, "answer", "think"):
        problems.append("<answer> is nested in <think>")
    if _inside(tags, "think", "answer"):
        problems.append("<think> is nested in <answer>")
    if not problems and think and answer:
        if answer[0] < think[0]:
            problems.append("out of order: <answer> comes before <think>")
        elif answer[0] < think[1] < answer[1]:
            problems.append("the blocks overlap")
    return problems


def _outside_problems(text: str, tags: Sequence[tuple[int, int, str]]) -> list[str]:
    """Text before, between and after blocks. Tags open and close by name, whatever their number."""
    outside, depth, last = [], 0, 0
    for start, end, tag in tags:
        if not depth:
            outside.append(text[last:start])
        depth = max(depth + (-1 if tag[1] == "/" else 1), 0)
        last = end
    if not depth:
        outside.append(text[last:])
    stray = " ".join(piece.strip() for piece in outside if piece.strip())
    if not stray:
        return []
    shown = stray if len(stray) <= 40 else stray[:37] + "..."
    return [f"text outside the blocks: {shown!r}"]


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
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = _LETTERS[rest] + letters
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
    """[system?], user: one {"type": "audio"} per clip, then the question, its options and the instruction."""
    lines = [example.question.strip()]
    if example.choices:
        lines.append(list_choices(example.choices, config.choice_style))
    if config.instruction:
        lines.append(config.instruction)
    content: list[dict[str, Any]] = [{"type": "audio"} for _ in example.clips]
    content.append({"type": "text", "text": "\n".join(line for line in lines if line)})
    chat: list[dict[str, Any]] = []
    if config.system_prompt:
        chat.append({"role": "system", "content": [{"type": "text", "text": config.system_prompt}]})
    return [*chat, {"role": "user", "content": content}]


_SLOTS: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def clip_slots(key: str, family: PromptFamily, clips: ClipStore) -> int:
    """Audio positions that a clip fills in this family, remembered by content."""
    known = _SLOTS.setdefault(family, {})
    if key not in known:
        known[key] = family.clip_slots(*clips.waveform(key))
    return known[key]


def build_prompt(example: Example, family: PromptFamily, clips: ClipStore, config: PromptConfig) -> Prompt:
    """Render the chat template, expand one audio token per clip to as many as the clip has features.

    Raises:
        PromptError: a clip cannot be read, or the ids do not hold exactly the expected audio slots.
    """
    chat = messages(example, config)
    try:
        keys = tuple(clips.key(clip) for clip in example.clips)
        slots = tuple(clip_slots(key, family, clips) for key in keys)
        text = family.render(chat)
        ids = tuple(family.tokenize(text, slots))
    except ValueError as error:  # AudioError is one
        raise PromptError(f"row {example.id}: {error}") from error
    if any(count < 1 for count in slots):
        raise PromptError(f"row {example.id}: a clip fills no audio slot ({slots}); it is too short for this model")
    found = ids.count(family.audio_token_id)
    if found != sum(slots):
        raise PromptError(
            f"row {example.id}: the prompt has {found} audio positions, its {len(keys)} clips need {sum(slots)}; "
            "does the question or the template hold an audio token of its own?"
        )
    return Prompt(example, tuple(chat), text, ids, keys, slots)
