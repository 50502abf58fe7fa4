"""Seconds of a chunk of full duplex over the 0.16 s that it lasts, by size of the model; weights are random.

    python benchmarks/duplex_realtime.py --threads 2 --output benchmarks/results/DATE-duplex-realtime-cpu.json

Forty chunks of noise are listened to and forty spoken: by the model alone, and with their sound decoded block by block
by the shipped decoder, as `covo-rl duplex run --realtime` does before it begins.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from covo_rl.duplex.grid import CHUNK_SAMPLES
from covo_rl.duplex.latency import real_time_factors
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.realtime import rehearse
from covo_rl.duplex.session import DuplexSession
from covo_rl.models.covo_audio.duplex_tokens import prepare_duplex
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.tiny import tiny_covo_audio
from covo_rl.run.commands.duplex import open_speaker
from covo_rl.speech import SHIPPED_DECODER

CHUNKS = 40
SIZES = {
    "tiny": {},
    "small": {"encoder_width": 384, "encoder_layers": 4, "adapter_hidden": 768, "decoder_width": 768,
              "decoder_layers": 12},
    "medium": {"encoder_width": 768, "encoder_layers": 12, "adapter_hidden": 1024, "decoder_width": 1024,
               "decoder_layers": 24},
}  # fmt: skip


def alone(session):
    """Costs of the model's chunks; the first warms up."""
    ids, noise = session.ids, torch.randn(2 * CHUNKS + 3, CHUNK_SAMPLES) / 100
    session.follow([ChunkDecision(token) for token in [ids.think] * (CHUNKS + 1) + [ids.shift]])
    session.follow([ChunkDecision(ids.text_pad)] * (CHUNKS + 1))
    for block_T in noise:
        session.push(block_T.numpy())
    return session.costs[1:]


def measure(sizes):
    """Real-time factors of a model of these sizes, and its millions of parameters."""
    model, processor = tiny_covo_audio(audio_codes=256, **sizes)
    prepare_duplex(model, processor.tokenizer, use_ids=(20, 21, 22), silence_codes=[0])
    session = DuplexSession.of(CovoAudio(model.eval(), processor), max_turn_seconds=8)
    factors = {"model": real_time_factors(alone(session))}
    factors["with_sound"] = real_time_factors(rehearse(session, open_speaker(session, SHIPPED_DECODER, None), CHUNKS))
    return {"parameters_m": sum(p.numel() for p in model.parameters()) / 1e6, **factors}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads}
    for name in options.sizes:
        results[name] = measure(SIZES[name])
        print(name, json.dumps(results[name]))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
