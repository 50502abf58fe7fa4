"""Measure the memory of a merged export: python tests/export_memory.py WIDTH LAYERS DTYPE [--verify].

Prints one JSON line: parameters, bytes of the model and of the largest shard, peak anonymous memory above what the
process held before the model existed, as a multiple of the larger of the two, and seconds.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: mapped files, which the kernel can drop, do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this measurement needs Linux")


class Peak:
    """Largest anonymous memory seen by a thread that looks every 5 ms."""

    def __init__(self) -> None:
        self.largest = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.005):
            self.largest = max(self.largest, anonymous_bytes())

    def stop(self) -> int:
        self.stopped.set()
        self.thread.join()
        return self.largest


def main(width: int, layers: int, dtype: str, check: bool) -> None:
    import torch

    from covo_rl.config import AdapterConfig
    from covo_rl.export import export_merged
    from covo_rl.export.exporting import write_merged
    from covo_rl.models.covo_audio.family import CovoAudio
    from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer
    from covo_rl.policy.modes import build

    sizes = {"encoder_width": 64, "encoder_layers": 1, "adapter_hidden": 64}
    build(CovoAudio(*tiny_covo_audio(tiny_tokenizer(["a"]), decoder_width=32, decoder_layers=1, **sizes)),
          AdapterConfig())  # fmt: skip  # imports everything once
    before = anonymous_bytes()
    torch.set_default_dtype(getattr(torch, dtype))
    model, processor = tiny_covo_audio(tiny_tokenizer(["a"]), decoder_width=width, decoder_layers=layers,
                                       decoder_heads=width // 64, **sizes)  # fmt: skip
    model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    torch.set_default_dtype(torch.float32)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    modes = build(CovoAudio(model, processor), AdapterConfig(lora_r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "merged"
        out.mkdir()
        peak, start = Peak(), time.perf_counter()
        write_merged(modes, out, None)
        seconds, top = time.perf_counter() - start, peak.stop() - before
        shard = max(file.stat().st_size for file in out.glob("*.safetensors"))
        report = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "model_bytes": size,
            "shard_bytes": shard,
            "peak_bytes": top,
            "peak_over_largest": round(top / max(size, shard), 3),
            "seconds": round(seconds, 1),
        }
        if check:
            base = Path(scratch) / "base"
            with modes.peft_model.disable_adapter():  # type: ignore[union-attr]
                from covo_rl.export.weights import Entry, base_name, published_names, write_shards

                base.mkdir()
                state = {base_name(n): t for n, t in model.state_dict().items() if base_name(n)}
                names = published_names(model, list(state))
                write_shards([Entry(names[n], tuple(t.shape), t.dtype, lambda t=t: t) for n, t in state.items()], base)
            model.config.save_pretrained(base)
            processor.save_pretrained(base)
            model.name_or_path = str(base)
            start = time.perf_counter()
            result = export_merged(modes, Path(scratch) / "verified")
            report |= {
                "verified": result.ok,
                "verified_seconds": round(time.perf_counter() - start, 1),
                "fresh_process_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], "--verify" in sys.argv)
