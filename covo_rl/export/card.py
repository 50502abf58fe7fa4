"""The model card of an export: what it is, how to use it from plain transformers and PEFT, what it scores, how it was
trained and verified. It names no path of the machine that wrote it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

from covo_rl import __version__
from covo_rl.config import PromptConfig, number_map, taught_prompt
from covo_rl.data.files import read_record, write_atomically
from covo_rl.export import ExportError
from covo_rl.prompt import messages
from covo_rl.resolve import BUILTIN
from covo_rl.types import Clip, Example

CARD = "model_card.md.jinja"
#: what the export.json of older releases does not say
OLDER = {"load_in_4bit": False, "trust_remote_code": False, "stock_processor": True, "shipped_adapter": "",
         "stock_logits_divisor": 1}  # fmt: skip
AUDIO_CHECKS = {"after_silent_audio": "silence", "after_swapped_audio": "another row's audio"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def update_card(folder: str | Path, run_folder: str | Path | None) -> Path:
    """Write README.md of an export, with what its run's folder says by now; returns its path.

    Raises:
        ExportError: `folder` is no export of ours, or a record there or of the run lacks what we write.
        ConfigError: its prompt.yaml is no wording.
    """
    folder = Path(folder)
    record, verification = (read_record(folder / name) for name in ("export.json", "verification.json"))
    if not record or not verification:
        raise ExportError(f"{folder}: export.json and verification.json are missing; covo-rl export writes them")
    config, environment, result = (
        read_record(Path(run_folder) / name) if run_folder else {}
        for name in ("config.yaml", "environment.json", "result.json")
    )
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    jinja = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # no HTML
    jinja.filters["without_paths"] = without_paths
    try:
        base = record["base_model"]
        on_hub = _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()
        academic = record["model_type"] == "covo_audio" and not str(config.get("model", "")).startswith(BUILTIN)
        named = yaml.safe_dump({"base_model": base}, allow_unicode=True, width=10_000).strip()
        card = jinja.get_template(CARD).render(
            **{**OLDER, **record, "base_model": without_paths(base)},
            on_hub=on_hub, shipped=base.startswith(BUILTIN), front_matter=named if on_hub else "",
            example=_example(folder), has_template=(folder / "chat_template.jinja").is_file(),
            academic_only=academic, covo_rl_version=environment.get("covo_rl") or __version__,
            config=config, environment=environment, result=result, verification=verification,
            heard={words: (result.get(key) or {}).get("accuracy_sampled") for key, words in AUDIO_CHECKS.items()},
            before=result.get("before") or {}, after=result.get("after") or {},
            rewards=number_map(config.get("rewards"), what="rewards", default=1.0),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise ExportError(f"{folder}: no model card, a record there or in {run_folder} is damaged: {error}") from error
    write_atomically(folder / "README.md", lambda file: file.write(card))
    return folder / "README.md"


def without_paths(value: Any) -> Any:
    """A value of a record as strangers may read it: of a path on this machine its last part, all else as it is.

    >>> without_paths("/home/me/clips/rows.json"), without_paths("openai:qwen@http://judge:8000/v1")
    ('rows.json', 'openai:qwen@http://judge:8000/v1')
    """
    if not isinstance(value, str) or "://" in value:
        return value
    kind = "transformers:" if value.startswith("transformers:") else ""  # a local judge
    name, colon, function = value.removeprefix(kind).partition(":")
    path = Path(name)
    local = path.is_absolute() or name.startswith((".", "~")) or (len(path.parts) > 1 and path.exists())
    return f"{kind}{path.name}{colon}{function}" if local else value


def _example(folder: Path) -> str:
    """The messages of a question in the wording of the export, as a Python literal."""
    wording = taught_prompt(folder / "prompt.yaml") if (folder / "prompt.yaml").is_file() else PromptConfig()
    row = Example("", (Clip(path="clip.wav"),), "How many beeps are there?", ("one", "two"), None, {})
    lines = (json.dumps(message, ensure_ascii=False) for message in messages(row, wording))  # texts and lists only
    return "[\n" + "".join(f"    {line},\n" for line in lines) + "]"
