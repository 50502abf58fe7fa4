"""`covo-rl train --help`: every option by room, with the default that holds. No torch.

--help         all rooms
--help short   the options of a first run, and the names of the rooms
--help loss    one room
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from covo_rl.config import ConfigError, rooms
from covo_rl.resolve import find, read_yaml

#: what a first run of one's own needs
FIRST = (
    "model", "data", "audio_dir", "eval_data", "rewards", "judge", "num_generations", "prompts_per_step", "max_steps",
    "learning_rate", "max_completion_length", "output", "overwrite", "resume", "checkpoint_every", "eval_every",
    "dry_run", "seed",
)  # fmt: skip
#: configuration that the recipe takes by itself -> for which model
CONFIGS = {
    "tiny": "builtin:tiny, or no --model", "tiny_zero": "builtin:tiny_zero",
    "tiny_random": "builtin:tiny_NAME, random weights of a family", "own_model": "any other model",
}  # fmt: skip
USAGE = """usage: covo-rl train [--config FILE.yaml] [--OPTION VALUE ...]

GRPO on audio questions: checks everything, evaluates, trains, exports a
verified adapter, evaluates again. On several GPUs: accelerate launch with
recipes/grpo_mmau.py and the same options.

  covo-rl train                              the demo, about three CPU minutes
  covo-rl train --data rows.json --audio-dir clips --model PATH --dry-run true
  covo-rl train --help short                 the options of a first run

Flags win over --config, that over defaults. In names - and _ are one. --full
is --lora false.
"""
#: columns of an option with its default, and of a line
LEFT, WIDTH = 33, 80


def wants_page(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def options_page(words: Sequence[str] = ()) -> str:
    """The page that the words after `covo-rl train` ask for.

    Raises:
        ConfigError: `--help` is followed by a word that is no room, or `short`.
    """
    at = next((i for i, word in enumerate(words) if word in ("-h", "--help")), len(words))
    topic = next((word for word in words[at + 1 : at + 2] if not word.startswith("-")), None)
    known = ["short", *rooms()]
    if topic is not None and topic not in known:
        raise ConfigError([f"--help {topic}: there are {', '.join(known)}"])
    others = other_defaults()
    items = {item.name: item for kind in rooms().values() for item in fields(kind)}
    if topic == "short":
        lines = [line for name in FIRST for line in option_lines(items[name], others)]
        lines += ["", "All options: --help; those of one room:"]
        lines += [f"  --help {name:<10} {_title(kind)}" for name, kind in rooms().items()]
        return "\n".join([USAGE, _explained(), *lines])
    chosen = {topic: rooms()[topic]} if topic else rooms()
    pages = [[f"{name}: {_title(kind)}", *(line for item in fields(kind) for line in option_lines(item, others)), ""]
             for name, kind in chosen.items()]  # fmt: skip
    return "\n".join([USAGE, _explained(), *(line for page in pages for line in page)])


def _title(kind: type) -> str:
    return textwrap.shorten((kind.__doc__ or "").strip().split("\n")[0], WIDTH - 20, placeholder=" ...")


def _explained() -> str:
    lines = [f"  {name:<11} {when}" for name, when in CONFIGS.items()]
    return ("Beside an option stands its default. Without --config the model's configuration\n"
            "of recipes/configs is taken; where it says otherwise, that is in brackets:\n"
            + "\n".join(lines) + "\n")  # fmt: skip


def other_defaults() -> dict[str, dict[str, Any]]:
    """Option -> {configuration that the recipe takes by itself: its value there}."""
    values: dict[str, dict[str, Any]] = {}
    for name in CONFIGS:
        for option, value in read_yaml(find("recipes", f"configs/{name}.yaml")).items():
            values.setdefault(option, {})[name] = value
    values.pop("model")  # by which it is taken
    return values


def default_of(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def option_lines(option: Field[Any], others: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`  --max-steps 60      generation steps [120: tiny]`, wrapped."""
    default, help = default_of(option), option.metadata["help"]
    shown = shown_value(default)
    head = f"  --{option.name.replace('_', '-')} {shown}"
    if len(head) >= LEFT:  # a long text goes to the explanation
        head, help = f"  --{option.name.replace('_', '-')}", f"{help}; default: {shown}"
    if choices := option.metadata.get("choices"):
        help += f" ({', '.join(choices)})"
    rest: dict[str, list[str]] = {}
    for name, value in others.get(option.name, {}).items():
        if value != default and _numbers(value) != _numbers(default):
            rest.setdefault(shown_value(value), []).append(name)
    if rest:
        help += " [" + "; ".join(f"{value}: {', '.join(names)}" for value, names in rest.items()) + "]"
    lines = textwrap.wrap(help, WIDTH - LEFT - 1, break_on_hyphens=False)
    if len(head) >= LEFT:
        return [head, *(f"{'':{LEFT}} {line}" for line in lines)]
    return [f"{head if i == 0 else '':<{LEFT}} {line}" for i, line in enumerate(lines)]


def _numbers(value: Any) -> Any:
    """`a,b` and {a: 1, b: 1} are the same rewards."""
    return dict.fromkeys(value.split(","), 1.0) if isinstance(value, str) else value


def shown_value(value: Any) -> str:
    """A default as it would be typed; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number:g}" for name, number in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return str(value) if value != "" else '""'
