"""What both trainings of speech share: options checked as a whole, a folder of their own, a state to resume from;
and the options of the tokenizer's."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar, cast, get_type_hints

from covo_rl.config import option, value_problems
from covo_rl.data.files import json_line, whole_lines, write_atomically
from covo_rl.records.lock import FolderLock
from covo_rl.resolve import ConfigError, read_yaml, typed_values
from covo_rl.train.ranks import Ranks
from covo_rl.types import UserError

STATE, METRICS = "training.pt", "metrics.jsonl"
#: what a resumed run may change
MAY_CHANGE = ("output", "audio_dir", "eval_data", "workers", "cache_mb", "save_steps", "resume", "overwrite")
LIMITS = {
    "[1, inf)": "clips steps batch_size gradient_accumulation_steps init_vectors save_steps",
    "[3, 1000000]": "pieces",
    "(0, inf)": "learning_rate encoder_learning_rate max_grad_norm",
    "[0, 1000000000]": "seed",
    "[0, inf)": "weight_decay ctc_weight mel_weight pitch_weight commitment_weight restart_below workers cache_mb",
    "[0, 1)": "warmup ema_decay",
}


class DivergedError(UserError, ArithmeticError):
    """The loss is no number any more."""


class Training(Protocol):
    """What the trainings of tokenizers and of decoders have in common."""

    output: str
    data: str | None
    audio_dir: str | None
    resume: bool
    overwrite: bool

    @property
    def steps(self) -> int: ...


_Training = TypeVar("_Training", bound=Training)


@dataclass
class TokenizerTraining:
    """`data`: rows of speech with audio and text, or nothing for `clips` utterances of built-in digits.

    `pieces`: outputs of a BPE, or nothing for one a word. `wavlm`: folder of a WavLM checkpoint to start from.
    `restart_below`: a code that is chosen less often than this an update, on average, is put elsewhere.
    """

    output: str = "runs/speech_tokenizer"
    data: str | None = None
    audio_dir: str | None = None
    eval_data: str | None = None
    clips: int = 800
    shape: str = option("tiny", "the size of it", choices=["tiny", "published"])
    wavlm: str | None = None
    pieces: int | None = None
    seed: int = 0
    steps: int = 900
    batch_size: int = 12
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    encoder_learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    ctc_weight: float = 1.0
    mel_weight: float = 1.0
    pitch_weight: float = 4.0
    commitment_weight: float = 0.25
    ema_decay: float = 0.95
    restart_below: float = 1.0
    init_vectors: int = 4
    dtype: str = option("float32", "what it computes in", choices=["float32", "bfloat16"])
    workers: int = 0
    cache_mb: float = 2048
    save_steps: int = 500
    resume: bool = False
    overwrite: bool = False


def recipe_parser(kind: type[Any], description: str | None) -> argparse.ArgumentParser:
    """Of `--config` and the options `kind`, as `read_options` takes them: what a command leaves out is None."""
    parser = argparse.ArgumentParser(
        description=description, epilog=inspect.getdoc(kind), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", help="of the options below, which win over it: see recipes/configs")
    for item in dataclasses.fields(kind):
        if item.metadata.get("yaml_only"):
            continue
        names = str(item.type).startswith("list")
        form: dict[str, Any] = {"metavar": "NAME,NAME", "type": lambda text: text.split(",")} if names else {
            "metavar": str(item.type).split()[0].upper()}  # fmt: skip
        form = {"action": "store_true"} if item.default is False else form
        words = [item.metadata.get("help", ""), ", ".join(item.metadata.get("choices", ()))]
        default = ",".join(cast(Any, item.default_factory)()) if names else item.default
        words.append("" if default is None or default is False else f"default {default}")
        text = "; ".join(filter(None, words)).replace("%", "%%")
        flags: Any = {**form, "default": None, "help": text}
        parser.add_argument(f"--{item.name.replace('_', '-')}", **flags)
    return parser


def read_options(
    kind: type[_Training], what: str, limits: Mapping[str, str], path: str | Path | None,
    overrides: Mapping[str, Any] | None, rules: Callable[[_Training], Sequence[tuple[bool, str]]],
) -> _Training:  # fmt: skip
    """The options `kind` of a YAML file, and `overrides` over it (those that are None are left out).

    `rules` are (holds, what is wrong otherwise) of options whose values are possible one by one.

    Raises:
        ConfigError: unknown names with the nearest valid one, impossible values, contradictions: all at once.
    """
    content = {} if path is None else read_yaml(path)
    content |= {name: value for name, value in (overrides or {}).items() if value is not None}
    problems: list[str] = []
    config = kind(**typed_values(get_type_hints(kind), content, problems, what))
    problems += value_problems(config, limits)
    shared = [
        (config.audio_dir is None or config.data is not None, "audio_dir needs data"),
        (not (config.resume and config.overwrite), "resume goes on, overwrite begins again: give one of them"),
    ]
    if problems := problems + [text for holds, text in (*rules(config), *shared) if not holds]:
        raise ConfigError(problems)
    return config


def read_training(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> TokenizerTraining:
    """The options of a tokenizer's training, as `read_options` reads them."""
    return read_options(TokenizerTraining, "tokenizer", LIMITS, path, overrides, _rules)


def _rules(config: TokenizerTraining) -> list[tuple[bool, str]]:
    return [
        (config.wavlm is None or config.shape == "published", "wavlm needs shape: published; a tiny one starts anew"),
        (config.eval_data is None or config.data is not None, "eval_data needs data"),
    ]


def folder_problem(config: Training) -> str | None:
    """Why the training may not write to its folder, or None."""
    folder = Path(config.output)
    if config.resume:
        return None if (folder / STATE).is_file() else f"resume: there is no {folder / STATE}"
    there = _left_over(folder)
    if not there or (config.overwrite and METRICS in there):
        return None
    return f"{folder} holds {', '.join(there)}: choose another --output, --resume, or --overwrite a training's folder"


def begin_folder(config: Training, step: int) -> None:
    """Called before the first update: takes away what an earlier training left, and the metrics after `step`."""
    folder = Path(config.output)
    if config.resume:
        lines = [json_line(line) for line in whole_lines(folder / METRICS)[0] if line["step"] <= step]
        write_atomically(folder / METRICS, lambda file: file.writelines(lines))
    else:
        for name in _left_over(folder):
            (folder / name).unlink()


def _left_over(folder: Path) -> list[str]:
    return [name for name in ("config.json", STATE, METRICS) if (folder / name).exists()]


def check_state(path: Path, config: Training) -> dict[str, Any]:
    """The saved state of a training with these options.

    Raises:
        ConfigError: it is damaged, or of other options, which are named.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        options, step = dict(state["options"]), int(state["step"])
    except (OSError, UnpicklingError, EOFError, RuntimeError, KeyError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError([f"{path}: no state of a training: {why}"]) from error
    now = _fixed_options(config)
    if other := {name: value for name, value in now.items() if options.get(name) != value}:
        raise ConfigError(
            [f"{path}: {name} {options.get(name)!r} there, {value!r} now" for name, value in other.items()]
        )
    if step > config.steps:
        raise ConfigError([f"{path} is of step {step}, after the last of {config.steps}"])
    return state


def save_state(folder: Path, config: Training, state: Mapping[str, Any]) -> None:
    """Write the state (`step` and what a resume needs) with the options that `check_state` compares, whole or not."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**state, "options": _fixed_options(config)}, folder / f"{STATE}.partial")
    os.replace(folder / f"{STATE}.partial", folder / STATE)


def _fixed_options(config: Training) -> dict[str, Any]:
    """Those that a resumed run may not change."""
    return {name: value for name, value in dataclasses.asdict(cast(Any, config)).items() if name not in MAY_CHANGE}


@contextmanager
def owned_folder(config: Training) -> Iterator[Ranks]:
    """This process's ranks, while `config.output` is this training's alone.

    Raises:
        ConfigError: the folder is taken or in use.
    """
    ranks, lock = Ranks.current(), FolderLock(config.output)
    problem = ranks.from_main((folder_problem(config) or lock.hold()) if ranks.main else None)
    if problem:
        raise ConfigError([problem])
    try:
        yield ranks
    finally:
        lock.release()
