"""Runs alone in a fresh process: load what was exported with plain transformers and PEFT, and write its logits.

    python -I fresh.py SPEC.json

It imports nothing of covo_rl unless the specification lists it under `imports` (a family that transformers does not
ship), and refuses such imports where `forbid` names them. The calling process judges the numbers.
"""

import contextlib
import importlib
import importlib.abc
import json
import logging
import sys
import warnings


class Forbid(importlib.abc.MetaPathFinder):
    """Makes a package unimportable, so that the export cannot lean on it by accident."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.names:
            raise ImportError(f"{fullname} must not be needed to load this export")
        return None


def model_class(name):
    """`module:Class` -> the class."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def logits(model, prompts, device, keep):
    """Logits (keep, V) float32 at the last positions of every prompt, one prompt at a time."""
    import torch

    results = []
    for prompt in prompts:
        inputs = {name: tensor.to(device) for name, tensor in prompt.items()}
        with torch.no_grad():
            out = model(**inputs, use_cache=False).logits
        results.append(out[0, -keep:].float().cpu().contiguous())
    return results


def load(spec, folder, dtype):
    """Model in eval mode, and the keys that were missing or unexpected."""
    import torch

    model, info = model_class(spec["model_class"]).from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, **spec["load_kwargs"]
    )
    problems = {kind: sorted(map(str, info.get(kind, ()))) for kind in ("missing_keys", "mismatched_keys")}
    return model.to(spec["device"]).eval(), problems


def read_prompts(path):
    """Tensors named `NUMBER.INPUT` -> one dict of inputs per prompt."""
    from safetensors.torch import load_file

    prompts = {}
    for name, tensor in load_file(path).items():
        number, key = name.split(".", 1)
        prompts.setdefault(int(number), {})[key] = tensor
    return [prompts[number] for number in sorted(prompts)]


def on_base(spec, prompts, dtype, results, notes):
    """Logits of the base model in one precision, and of every adapter that is checked on it."""
    from peft import PeftModel

    model, problems = load(spec, spec["base"], dtype)
    notes[f"base {dtype}"] = problems
    results[f"base.{dtype}"] = logits(model, prompts, spec["device"], spec["keep"])
    adapters = [t for t in spec["targets"] if t["kind"] == "adapter" and t["dtype"] == dtype]
    for number, target in enumerate(adapters):
        if number:  # PEFT's unload keeps trained copies in place of the originals
            model, _ = load(spec, spec["base"], dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, target["folder"]).eval()
        missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message).lower()]
        notes[target["name"]] = {"missing_keys": missing}
        results[target["name"]] = logits(model, prompts, spec["device"], spec["keep"])


def on_merged(spec, prompts, target, results, notes):
    """Logits of a merged folder, and its processor's rendering of the stored messages."""
    model, notes[target["name"]] = load(spec, target["folder"], target["dtype"])
    results[target["name"]] = logits(model, prompts, spec["device"], spec["keep"])
    if target.get("messages"):
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(target["folder"])
        notes[target["name"]]["rendered"] = [
            processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in target["messages"]
        ]


def main(path):
    """Read SPEC.json; write logits.safetensors and notes.json beside it."""
    with open(path, encoding="utf-8") as file:
        spec = json.load(file)
    sys.meta_path.insert(0, Forbid(set(spec["forbid"])))
    for name in spec["imports"]:
        importlib.import_module(name)
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    prompts, results, notes = read_prompts(spec["prompts"]), {}, {}
    for dtype in dict.fromkeys(target["dtype"] for target in spec["targets"]):
        on_base(spec, prompts, dtype, results, notes)
    for target in spec["targets"]:
        if target["kind"] == "merged":
            on_merged(spec, prompts, target, results, notes)
    flat = {f"{name}.{i}": tensor for name, tensors in results.items() for i, tensor in enumerate(tensors)}
    save_file(flat, spec["output"])
    notes["loaded"] = sorted(name for name in ("covo_rl", "trl", "accelerate") if name in sys.modules)
    notes["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    with open(spec["notes"], "w", encoding="utf-8") as file:
        json.dump(notes, file)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(sys.argv[1])
