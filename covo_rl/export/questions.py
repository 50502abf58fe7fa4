"""Questions to a fresh process, in files: prompts and folders in, logits out (`fresh.py` answers).

write_questions(work, family, base, targets, prompts, clips)     one folder for each model
answer_questions([work, ...], own=False)                         one process for all of them
logits, notes = read_answers(work)
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from covo_rl.audio import ClipStore
from covo_rl.export import ExportError
from covo_rl.models.base import AudioFamily
from covo_rl.models.processor import AudioProcessor
from covo_rl.models.quantised import element_count
from covo_rl.models.weights import shipped_adapter, weights_alone
from covo_rl.types import Prompt

KEEP = 8  # last positions compared: each of them has heard all the audio


@dataclass(frozen=True)
class Target:
    """One folder to check: an `adapter` on the base, or a `merged` model; its base quantised where that is said."""

    name: str
    kind: str
    folder: Path
    dtype: str
    quantization_config: Mapping[str, Any] | None = None

    @property
    def base(self) -> str:
        """Name of the logits of the base that it is compared with."""
        return f"base.{self.dtype}{'.4bit' if self.quantization_config else ''}"


def device_with_room(family: AudioFamily, target: Target) -> str:
    """The policy's own device where a second copy of the model fits as `target` holds it, else cpu."""
    parameters = list(family.model.parameters())
    if (device := parameters[0].device).type != "cuda":
        return "cpu"
    width, held = getattr(torch, target.dtype).itemsize, target.quantization_config
    size = sum(p.numel() * p.element_size() if held else element_count(p) * width for p in parameters)
    torch.cuda.empty_cache()  # what only torch holds counts as taken
    return str(device) if torch.cuda.mem_get_info(device)[0] > 1.3 * size else "cpu"


def is_ours(family: AudioFamily) -> bool:
    """The model's class is covo_rl's own, so that the fresh process needs covo_rl for it."""
    return type(family.model).__module__.startswith("covo_rl.")


def stock_class(family: AudioFamily) -> tuple[str, str, bool]:
    """(module, class, whether code of the checkpoint runs) by which others load the model."""
    kind = type(family.model)
    if kind.__module__.startswith("transformers_modules."):
        return "transformers", str(family.model_class), True
    return kind.__module__ if is_ours(family) else "transformers", kind.__name__, False


def stock_inputs(prompt: Prompt, family: AudioFamily, clips: ClipStore) -> dict[str, torch.Tensor]:
    """What the plain model's own forward takes: ids, mask, and audio tensors (rows of all clips), on the CPU.

    Raises:
        ExportError: the forward has no argument of the name that the family gives a tensor.
    """
    ids = torch.tensor([prompt.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    features = [family.clip_features(*clips.waveform(key)).tensors for key in prompt.clip_keys]
    for name in features[0] if features else ():
        inputs[name] = torch.cat([clip[name] for clip in features]).contiguous()
    names = inspect.signature(type(family.model).forward).parameters
    if unknown := sorted(inputs.keys() - names):
        raise ExportError(
            f"{type(family.model).__name__} takes no {', '.join(unknown)}: extract() of {type(family).__name__} must "
            f"name its tensors as the model's forward does ({', '.join(n for n in names if 'feature' in n)})"
        )
    return inputs


def _reader(family: AudioFamily) -> str:
    """Class of transformers that renders the template of an export: the stock processor, or where that imports
    torchvision the tokenizer's class."""
    stock = not isinstance(family.processor, AudioProcessor)
    return "AutoProcessor" if stock else str(getattr(family, "tokenizer_class", "AutoTokenizer"))


def write_questions(
    work: Path, family: AudioFamily, base: str, targets: Sequence[Target], prompts: Sequence[Prompt], clips: ClipStore
) -> None:
    """What a fresh process needs to answer for one family, into the folder `work`."""
    alone, (module, name, has_code) = work / "base", stock_class(family)
    alone.mkdir()
    spec = {
        "module": module, "class": name, "trust_remote_code": has_code,
        "base": weights_alone(base, alone), "shipped": str(shipped_adapter(base, family.adapter_folder) or ""),
        "divisor": family.stock_logits_divisor, "reader": _reader(family),
        "keep": KEEP, "messages": [family.template_messages(prompt.messages) for prompt in prompts],
        "targets": [vars(target) | {"folder": str(target.folder.resolve()), "base": target.base,
                                    "device": device_with_room(family, target)} for target in targets],
    }  # fmt: skip
    inputs = {f"{i}.{name}": tensor for i, prompt in enumerate(prompts)
              for name, tensor in stock_inputs(prompt, family, clips).items()}  # fmt: skip
    save_file(inputs, work / "prompts.safetensors")
    (work / "spec.json").write_text(json.dumps(spec), encoding="utf-8")


def answer_questions(folders: Sequence[Path], *, own: bool) -> None:
    """One fresh process answers in each of the folders of `write_questions`; `own` lets it import covo_rl.

    Raises:
        ExportError: the process failed; the message ends with what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if own:  # a checkout that was not installed is found as well
        package = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    script = str(Path(__file__).with_name("fresh.py"))
    done = subprocess.run(
        [sys.executable, "-P", script, *map(str, folders)],
        env=environment, capture_output=True, text=True, timeout=3600, check=False, cwd=os.sep,
    )  # fmt: skip
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
        raise ExportError(f"the export does not load in a fresh process (exit code {done.returncode}):\n{tail}")


def read_answers(work: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits and notes that `answer_questions` left."""
    return load_file(work / "logits.safetensors"), json.loads((work / "notes.json").read_text(encoding="utf-8"))
