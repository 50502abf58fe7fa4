"""Do exports answer on vLLM as the trained policy does? Run in an environment with vLLM; docs/serving.md says how.

    python tests/serving/vllm_check.py                          # every family below, merged and LoRA
    python tests/serving/vllm_check.py --family audioflamingo3
    python tests/serving/vllm_check.py --keep tiny-exports      # leaves base, adapter and merged for `vllm serve`

For each family a tiny random base gets a LoRA adapter with random weights. Adapter and merged weights are exported
with the usual check, loaded by vLLM, and the log-probs of the first token over the whole vocabulary are compared with
those of the policy in memory, for three clips of different lengths. One process per engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4  # float32 log-probs
SECONDS = (1.0, 2.35, 7.2)  # tiny Covo-Audio has segments of 3 s: one, one, three
QUESTION = "What do you hear?"
#: vLLM's own Qwen2-Audio takes no adapters; our plug-in has one that does.
OVERRIDES: dict[str, dict] = {
    "covo_audio": {}, "qwen2_audio": {"architectures": ["Qwen2AudioWithLoRA"]}, "audioflamingo3": {}, "glmasr": {},
    "qwen3_asr": {}, "granite_speech": {},
}  # fmt: skip
#: encoded with clips of other lengths they get other features on vLLM, which pads them without a mask
ALONE = {"granite_speech"}
#: vLLM's attention wants heads of 32 and more: configuration of transformers, and what is larger than in the tiny model
SIZES: dict[str, tuple[str, dict[str, dict]]] = {
    "qwen3_asr": ("Qwen3ASRConfig", {
        "text_config": {"head_dim": 64}, "audio_config": {"output_dim": 256, "d_model": 128}}),
    "granite_speech": ("GraniteSpeechConfig", {"encoder_config": {"input_dim": 160}}),
}  # fmt: skip


def clip(seconds: float, rate: int) -> np.ndarray:
    """A rising tone in a little noise, float32."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(round(10 * seconds)).standard_normal(t.size)
    return (0.3 * np.sin(2 * np.pi * (200 + 150 * t) * t) + 0.02 * noise).astype(np.float32)


# -- our side ----------------------------------------------------------------------------------------------------


def write_base(name: str, folder: Path) -> None:
    """A tiny random checkpoint under published names."""
    from covo_rl.export.merged import save_processor, write_shards
    from covo_rl.models import family_class
    from covo_rl.models.tiny import decoder_sizes, tiny_covo_audio, tiny_model, tiny_qwen2_audio, tiny_tokenizer
    from covo_rl.policy.entries import merged_entries

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import published

    if name == "covo_audio":
        tokenizer = tiny_tokenizer([QUESTION])
        model, processor = tiny_covo_audio(tokenizer, audio_codes=16, decoder_width=256, encoder_layers=1)
    elif name == "qwen2_audio":  # vLLM's attention kernels want heads of 32 and more, its encoder 128 mel bins
        model, processor = tiny_qwen2_audio(encoder_width=256, encoder_layers=1, decoder_width=256, mel_bins=128)
    else:
        decoder_sizes.__defaults__ = (256, 2, 4)
        enlarge(name)
        folder.mkdir(parents=True)
        published.write_published(*tiny_model(name), published.tables()[name], folder)
        return
    model.save_pretrained(folder)
    write_shards(merged_entries(model), folder)
    save_processor(family_class(name)(model, processor), folder)


def enlarge(name: str) -> None:
    """Let the tiny model of this process have the sizes of the table."""
    import transformers

    from covo_rl.models.tiny import granite_speech

    granite_speech.BINS = 80  # vLLM takes the stock features
    if name in SIZES:
        label, more = SIZES[name]
        original = getattr(transformers, label)
        setattr(transformers, label, lambda **parts: original(
            **{part: {**value, **more[part]} if part in more else value for part, value in parts.items()}))  # fmt: skip


def prepare(name: str, root: Path) -> None:
    """Base, adapter, merged, and what the policy and its base say about three prompts, under `root`."""
    import torch

    from covo_rl.audio import ClipStore
    from covo_rl.config import AdapterConfig, PromptConfig
    from covo_rl.export.exporting import export_adapter, export_merged
    from covo_rl.export.verify import policy_logits
    from covo_rl.models import load_family
    from covo_rl.policy.trainable import make_trainable as build_modes
    from covo_rl.prompt import build_prompt
    from covo_rl.types import Clip, Example

    torch.manual_seed(0)
    write_base(name, root / "base")
    modes = build_modes(load_family(str(root / "base")), AdapterConfig(lora_r=8))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in modes.family.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    export_adapter(modes, root / "adapter")
    export_merged(modes, root / "merged")

    clips = ClipStore()
    rate = 16000
    rows = [
        Example(f"{s:g} s", (Clip(array=clip(s, rate), sampling_rate=rate),), QUESTION, ("a tone", "a dog"))
        for s in SECONDS
    ]
    prompts = [build_prompt(row, modes.family, clips, PromptConfig()) for row in rows]
    logps = {"trained": [policy_logits(p, modes.family, clips)[-1].log_softmax(-1) for p in prompts]}
    assert modes.peft_model is not None
    with modes.peft_model.disable_adapter():
        logps["base"] = [policy_logits(p, modes.family, clips)[-1].log_softmax(-1) for p in prompts]
    np.savez(root / "ours.npz", **{key: torch.stack(value).numpy() for key, value in logps.items()})
    asked = [{"text": p.text, "seconds": s, "slots": sum(p.slots)} for p, s in zip(prompts, SECONDS, strict=True)]
    (root / "prompts.json").write_text(json.dumps(asked))


# -- vLLM's side -------------------------------------------------------------------------------------------------


def ask_vllm(root: Path, kind: str, overrides: dict) -> None:
    """First-token log-probs (prompts, V) from one engine: `merged`, or `lora`, which also serves the base."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_lora_rank": 8, "hf_overrides": overrides} if kind == "lora" else {}
    start = time.perf_counter()
    llm = LLM(
        str(root / ("merged" if kind == "merged" else "base")), dtype="float32", enforce_eager=True,
        max_model_len=1024, max_num_seqs=4, limit_mm_per_prompt={"audio": 1}, max_logprobs=-1, **options,
    )  # fmt: skip
    seconds = {"start": round(time.perf_counter() - start, 1)}
    asked = json.loads((root / "prompts.json").read_text())
    prompts = [
        {"prompt": row["text"], "multi_modal_data": {"audio": (clip(row["seconds"], 16000), 16000)}} for row in asked
    ]
    first = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1)
    requests = {"merged": None} if kind == "merged" else {"lora": LoRARequest("tuned", 1, str(root / "adapter")),
                                                          "base": None}  # fmt: skip
    found = {}
    for key, request in requests.items():
        start = time.perf_counter()
        calls = [[prompt] for prompt in prompts] if root.name in ALONE else [prompts]
        outputs = [o for some in calls for o in llm.generate(some, first, lora_request=request, use_tqdm=False)]
        seconds[key] = round(time.perf_counter() - start, 1)
        rows = [{token: entry.logprob for token, entry in o.outputs[0].logprobs[0].items()} for o in outputs]
        found[key] = np.array([[row[token] for token in sorted(row)] for row in rows])
    np.savez(root / f"vllm_{kind}.npz", **found)
    (root / f"seconds_{kind}.json").write_text(json.dumps(seconds))


def engine(root: Path, kind: str, overrides: dict) -> None:
    """`ask_vllm` in a process of its own."""
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
             "HF_HUB_OFFLINE": "1"}  # fmt: skip
    words = [sys.executable, __file__, "--engine", kind, "--folder", str(root), "--overrides", json.dumps(overrides)]
    done = subprocess.run(words, env={**quiet, **os.environ}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vLLM failed on {root} ({kind}):\n" + "\n".join(done.stderr.splitlines()[-30:]))


def compare(root: Path) -> dict:
    """Largest differences of log-probs, per served kind, from what it must equal and from what it must not."""
    ours = np.load(root / "ours.npz")
    report = {}
    for kind, must, other in (("merged", "trained", "base"), ("lora", "trained", "base"), ("base", "base", "trained")):
        served = np.load(root / f"vllm_{'merged' if kind == 'merged' else 'lora'}.npz")[kind]
        equal, apart = (np.abs(served - ours[key]).max(1) for key in (must, other))
        report[kind] = {"vocabulary": served.shape[1], f"from {must}": equal.tolist(), f"from {other}": apart.tolist(),
                        "ok": bool(equal.max() <= TOLERANCE and apart.min() > 100 * TOLERANCE)}  # fmt: skip
    return report


def check(name: str, root: Path) -> bool:
    root.mkdir(parents=True)
    prepare(name, root)
    engine(root, "merged", {})
    engine(root, "lora", OVERRIDES[name])
    report = compare(root)
    for kind in ("merged", "lora"):
        report[kind]["seconds"] = json.loads((root / f"seconds_{kind}.json").read_text())
    report["prompts"] = json.loads((root / "prompts.json").read_text())
    (root / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for kind in ("merged", "lora", "base"):
        row = report[kind]
        must, other = [key for key in row if key.startswith("from ")]
        print(f"{name} {kind} on vLLM: max |log-prob difference| {must} {max(row[must]):.2g}, "
              f"{other} {min(row[other]):.2g} (over {row['vocabulary']} tokens, {len(SECONDS)} clips): "
              f"{'ok' if row['ok'] else 'FAILED'}", flush=True)  # fmt: skip
    return all(report[kind]["ok"] for kind in ("merged", "lora", "base"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=sorted(OVERRIDES), help="default: all")
    parser.add_argument("--keep", type=Path, help="write everything here and leave it")
    parser.add_argument("--engine", choices=["merged", "lora"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--overrides", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        ask_vllm(given.folder, given.engine, given.overrides)
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = given.keep or Path(scratch)
        results = [check(name, root / name) for name in given.family or sorted(OVERRIDES)]
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
