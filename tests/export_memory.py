"""Measure the memory of a merged export: python tests/export_memory.py WIDTH LAYERS DTYPE.

Writes a Covo-Audio with random weights, loads it, adds LoRA, exports it merged and verified. Prints one JSON line:
parameters, bytes of the model and of the largest shard, peak memory above what the process held before the model, as
a multiple of the larger of the two, and seconds.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

BLOCK = 1 << 20  # random numbers that weights repeat: drawing a billion takes minutes


def resident_bytes() -> int:
    """Resident memory of this process, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS: this measurement needs Linux")


class Peak:
    """Largest resident memory seen by a thread that looks every 5 ms."""

    def __init__(self) -> None:
        self.largest = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.005):
            self.largest = max(self.largest, resident_bytes())

    def stop(self) -> int:
        self.stopped.set()
        self.thread.join()
        return self.largest


def write_base(folder: Path, width: int, layers: int, dtype: str) -> None:
    """A checkpoint with random weights, streamed: no model of this size is ever held."""
    import torch

    from covo_rl.export.merged import write_shards
    from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer
    from covo_rl.policy.entries import Entry

    with torch.device("meta"):
        model, processor = tiny_covo_audio(
            tiny_tokenizer(["a"]), decoder_width=width, decoder_layers=layers, decoder_heads=width // 64,
            encoder_width=64, encoder_layers=1, adapter_hidden=64,
        )  # fmt: skip
    kind = getattr(torch, dtype)
    with torch.device("cpu"):
        block = 0.02 * torch.randn(BLOCK)

    def make(name: str, shape: torch.Size) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=kind)
        return block.repeat(-(-shape.numel() // BLOCK))[: shape.numel()].reshape(shape).to(kind)

    folder.mkdir()
    write_shards(
        [Entry(n, tuple(t.shape), kind, lambda n=n, s=t.shape: make(n, s)) for n, t in model.state_dict().items()],
        folder,
    )
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(width: int, layers: int, dtype: str) -> None:
    import torch

    from covo_rl.config import AdapterConfig
    from covo_rl.export.exporting import export_merged
    from covo_rl.export.merged import write_merged
    from covo_rl.models.covo_audio.family import CovoAudio
    from covo_rl.policy.trainable import make_trainable

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_base(root / "small", 64, 1, dtype)
        make_trainable(CovoAudio.load(str(root / "small")), AdapterConfig())  # imports everything once
        write_base(root / "base", width, layers, dtype)
        before = resident_bytes()
        modes = make_trainable(CovoAudio.load(str(root / "base")), AdapterConfig(lora_r=4))
        model = modes.family.model
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        (root / "merged").mkdir()
        peak, start = Peak(), time.perf_counter()
        write_merged(modes.family, root / "merged")
        seconds, top = time.perf_counter() - start, peak.stop() - before
        shard = max(file.stat().st_size for file in (root / "merged").glob("*.safetensors"))
        start = time.perf_counter()
        result = export_merged(modes, root / "verified")
        report = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "model_bytes": size,
            "shard_bytes": shard,
            "peak_bytes": top,
            "peak_over_largest": round(top / max(size, shard), 3),
            "seconds": round(seconds, 1),
            "verified": result.ok,
            "verified_seconds": round(time.perf_counter() - start, 1),
            "fresh_process_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
