"""Runs alone in a fresh process: load what was exported with plain transformers and PEFT, and write its logits.

    python -P fresh.py FOLDER...    spec.json, prompts.safetensors -> logits.safetensors, notes.json, in each of them

It imports nothing of covo_rl, and lets nobody do so, unless the model's class is ours (a family that transformers does
not ship). The calling process judges the numbers.
"""

import importlib
import json
import logging
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file


def answers(spec, cls, prompts):
    """Logits (P, keep, V) float32 of every target and of its base, and notes, by name."""
    logits, notes = {}, {}
    trusted = {"trust_remote_code": True} if spec["trust_remote_code"] else {}  # as whoever trained it has allowed

    def load(folder, target):
        """Model in eval mode, and the keys that were missing or had another shape."""
        options = {"dtype": getattr(torch, target["dtype"]), "output_loading_info": True, **trusted}
        if target["quantization_config"]:
            held = transformers.BitsAndBytesConfig.from_dict(target["quantization_config"])
            options |= {"quantization_config": held, "device_map": {"": target["device"]}}
        model, info = cls.from_pretrained(folder, **options)
        for module in model.modules():  # else a CPU may multiply in bfloat16, see covo_rl/models/quantised.py
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if spec["shipped"] and folder == spec["base"]:  # the LoRA of the checkpoint itself, under ours
            model = peft.PeftModel.from_pretrained(model, spec["shipped"]).merge_and_unload()
        problems = {kind: sorted(map(str, info.get(kind, ()))) for kind in ("missing_keys", "mismatched_keys")}
        return model.to(target["device"]).eval(), problems

    @torch.no_grad()
    def ask(model):
        rows = []
        for prompt in prompts:
            inputs = {key: tensor.to(model.device) for key, tensor in prompt.items()}
            logits = model(**inputs, use_cache=False).logits[0, -spec["keep"] :].float()
            rows.append((logits / spec["divisor"]).cpu())
        return torch.stack(rows)

    for target in spec["targets"]:
        name, folder, base = target["name"], target["folder"], target["base"]
        if target["kind"] == "adapter" or base not in notes:  # each on its own: unloading an adapter leaves copies
            model = None  # one model at a time
            model, notes[base] = load(spec["base"], target)
            logits[base] = ask(model)
        if target["kind"] == "adapter":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = peft.PeftModel.from_pretrained(model, folder).eval()
            missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message).lower()]
            notes[name] = {"missing_keys": missing}
        else:
            model = None
            model, notes[name] = load(folder, target)
            # the stock processors of models that also see import torchvision; the template is the tokenizer's too
            render = getattr(transformers, spec["reader"]).from_pretrained(folder, **trusted).apply_chat_template
            notes[name]["rendered"] = [render(m, tokenize=False, add_generation_prompt=True) for m in spec["messages"]]
        logits[name] = ask(model)
    return logits, notes


def main(folder):
    """Read spec.json and the prompts (tensors named `NUMBER.INPUT`) in `folder`; write logits and notes there."""
    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    if not spec["module"].startswith("covo_rl."):  # importing it now fails: nothing leans on it by accident
        sys.modules["covo_rl"] = None  # pyright: ignore[reportArgumentType]
    cls = getattr(importlib.import_module(spec["module"]), spec["class"])
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    prompts = {}
    for name, tensor in load_file(folder / "prompts.safetensors").items():
        number, key = name.split(".", 1)
        prompts.setdefault(int(number), {})[key] = tensor
    logits, notes = answers(spec, cls, [prompts[number] for number in sorted(prompts)])
    save_file(logits, folder / "logits.safetensors")
    notes["loaded"] = sorted(name for name in ("covo_rl", "trl", "accelerate") if sys.modules.get(name))
    notes["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    (folder / "notes.json").write_text(json.dumps(notes), encoding="utf-8")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(Path(path))
