"""Examples -> rows of another trainer: the conversation that is trained on here, absolute paths, and the whole row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.audio import decode, resample
from covo_rl.config import PromptConfig
from covo_rl.data import DataError, Problem
from covo_rl.data.chat import TAG
from covo_rl.data.convert import stored_path
from covo_rl.data.files import plain
from covo_rl.prompt import CONTROL, messages
from covo_rl.types import Clip, Example

if TYPE_CHECKING:
    import numpy as np

TRAINERS = ("verl", "swift", "nemo-rl")
#: what these trainers replace wherever it stands in a text
_TAGS = (TAG, "<image>", "<video>", "<bbox>", "<ref-object>", "<cot-process>", "<start-image>")


def trainer_rows(
    examples: Sequence[Example], trainer: str, audio_dir: str | Path, prompt: PromptConfig
) -> list[dict[str, Any]]:
    """Rows as verl's RLHFDataset, ms-swift or our dataset for NeMo RL (interop/nemo_rl.py) read them.

    `covo_row` is JSON text: the example as `rewards.columns.example_from_row` reads it, whatever its columns hold.

    Raises:
        DataError: rows whose text that trainer would read as something else, or that it cannot express.
        ValueError: an unknown trainer.
    """
    if trainer not in TRAINERS:
        raise ValueError(f"trainer {trainer!r} is not known; use {', '.join(TRAINERS)}")
    chats = [_chat(example, prompt) for example in examples]
    pairs = list(zip(examples, chats, strict=True))
    problems = [Problem(example.id, what) for example, chat in pairs for what in _unfit(example, chat, trainer)]
    if problems:
        raise DataError(f"conversion to {trainer}", problems)
    rows = []
    for number, (example, chat) in enumerate(pairs):
        audios = [stored_path(clip, Path(audio_dir)) for clip in example.clips]
        columns = {f"row/{name}": value for name, value in plain(example.columns).items()}
        row = {"id": example.id, "clips": audios, "question": example.question, "choices": list(example.choices),
               "answer": example.answer}  # fmt: skip
        text, answer = json.dumps(row | columns, ensure_ascii=False), example.answer or ""
        if trainer == "verl":
            extra = {"index": number, "covo_row": text}
            rows.append({"data_source": "covo_rl", "prompt": chat, "audios": audios, "ability": "audio",
                         "reward_model": {"style": "rule", "ground_truth": answer}, "extra_info": extra})  # fmt: skip
        else:
            rows.append({"messages": chat, "audios": audios, "solution": answer, "covo_row": text})
    return rows


def _chat(example: Example, prompt: PromptConfig) -> list[dict[str, str]]:
    """Messages whose contents are text, with a tag where a clip is heard."""
    texts = {"audio": lambda part: TAG, "text": lambda part: part["text"]}
    return [
        {"role": turn["role"], "content": "".join(texts[part["type"]](part) for part in turn["content"])}
        for turn in messages(example, prompt)
    ]


def _unfit(example: Example, chat: Sequence[dict[str, str]], trainer: str) -> list[str]:
    text = "".join(turn["content"] for turn in chat)
    tags = [tag for tag in _TAGS if text.count(tag) > (len(example.clips) if tag == TAG else 0)]
    tokens = sorted({token[0] for token in CONTROL.finditer(text)})
    problems = [f"its text holds {mark}, which {trainer} does not take as text" for mark in (*tags, *tokens)]
    if trainer == "nemo-rl" and chat[0]["role"] == "system":
        problems.append("it has a system message, which NeMo RL's processor of audio leaves out")
    return problems


def waveform_at(path: str, rate: int) -> np.ndarray:
    """A clip file as mono float32 (samples,) at a rate in Hz."""
    return resample(*decode(Clip(path=path)), rate)
