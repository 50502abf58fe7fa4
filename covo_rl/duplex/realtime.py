"""Whether a session keeps up with sound: tried before anybody waits for it."""

from __future__ import annotations

import torch

from covo_rl.duplex.grid import CHUNK_SAMPLES
from covo_rl.duplex.latency import ChunkCost
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.session import DuplexSession


def rehearse(session: DuplexSession, chunks: int = 20) -> list[ChunkCost]:
    """What chunks of listening and of speaking cost, on noise, so many of each; the session is new before and after.

    The first of each warm up, and are left out.
    """
    ids = session.ids
    count = min(chunks, session.max_turn_chunks)
    session.reset()
    session.follow([ChunkDecision(ids.think)] * (chunks + 1))
    session.follow([ChunkDecision(ids.shift), *[ChunkDecision(ids.text_pad)] * (count + 1)])
    noise = torch.randn((chunks + count + 4) * CHUNK_SAMPLES, generator=torch.Generator().manual_seed(0)) / 100
    for block in noise.split(CHUNK_SAMPLES):
        session.push(block.numpy())
    listening = [cost for cost in session.costs if not cost.speaking][1:]
    speaking = [cost for cost in session.costs if cost.speaking][1:]
    session.reset()
    return [*listening[:chunks], *speaking[:count]]
