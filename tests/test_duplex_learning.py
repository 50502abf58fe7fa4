"""A recurrent model of 22,000 parameters fails as the report says of full duplex, and RL of timing repairs some of it.

Supervised on short pauses it answers after a limit of silence: right on single turns, early in long pauses.
"""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from covo_rl.duplex.features import TEST_COUNTS, draw_streams, encoder_features
from covo_rl.duplex.figures import timing_figures
from covo_rl.duplex.rollout import sample_stops, score_stops, stop_logps
from covo_rl.duplex.timing import TimingOptions, timing_loss
from covo_rl.rewards import components

WIDTH = 48


@cache
def heard(stream):
    """Once per stream."""
    return torch.from_numpy(encoder_features(stream, WIDTH))


class Listener(nn.Module):
    """Features, and whether it speaks -> logits of SHIFT and of BREAK in every chunk."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(WIDTH + 1, 64, batch_first=True), nn.Linear(64, 2)

    def forward(self, streams):
        inputs = torch.zeros(len(streams), max(stream.chunks for stream in streams), WIDTH + 1)
        for row, stream in zip(inputs, streams, strict=True):
            row[: stream.chunks, :WIDTH] = heard(stream)
            row[stream.first_chunk or stream.chunks :, WIDTH] = 1
        return self.head(self.body(inputs)[0])

    def stop_logits(self, streams):
        spans = [slice(s.first_chunk, s.first_chunk + s.decisions) for s in streams]
        both = zip(streams, spans, self(streams), strict=True)
        return [z[span, 0 if stream.listening else 1] for stream, span, z in both]


def supervise(model, streams, steps):
    """Both decisions of each supervised stream: SHIFT in its first part, BREAK in its reply."""
    optimiser, rng = torch.optim.Adam(model.parameters(), 3e-3), np.random.default_rng(0)
    for _ in range(steps):
        batch = [streams[i] for i in rng.integers(len(streams), size=16)]
        losses = []
        for stream, z in zip(batch, model(batch), strict=True):
            first, last = stream.first_chunk, stream.first_chunk + stream.decisions
            losses += [stop_logps(z[:first, 0])[stream.shift_chunk], stop_logps(z[first:last, 1])[stream.gold_stop]]
        optimiser.zero_grad()
        (-torch.stack(losses).sum() / 16).backward()
        optimiser.step()


def reinforce(model, streams, steps):
    rewards = components("early_response,turn_taking,response_delay,barge_in,back_channel,hold_floor")
    totals = [scored.total_S for scored in score_stops(streams, rewards)]
    with torch.no_grad():
        references = model.stop_logits(streams)
    optimiser, rng = torch.optim.Adam(model.parameters(), 2e-3), np.random.default_rng(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        batch = rng.integers(len(streams), size=16)
        z = model.stop_logits([streams[i] for i in batch])
        stops = [sample_stops(z_K, 16, rng) for z_K in z]
        loss, _ = timing_loss(
            z, [totals[i] for i in batch], stops, TimingOptions(trunk_weight=1.0), [references[i] for i in batch]
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()


@pytest.mark.slow
def test_supervision_answers_early_in_long_pauses_and_rewards_repair_some_of_it():
    torch.manual_seed(0)
    model, test_set = Listener(), draw_streams("test", {kind: n // 2 for kind, n in TEST_COUNTS.items()}, seed=9)

    @torch.no_grad()
    def figures():
        return timing_figures(test_set, model.stop_logits(test_set))

    supervise(model, draw_streams("sft", 1200, seed=0), 450)
    before = figures()
    assert before["early_long_pause"] >= 0.8 and before["single_turn_success"] >= 0.95
    reinforce(model, draw_streams("rl", 600, seed=1), 150)
    after = figures()
    assert after["early_long_pause"] <= before["early_long_pause"] - 0.2
    assert after["single_turn_success"] >= 0.8 and after["long_pause_success"] >= before["long_pause_success"] + 0.2
    assert min(after["barge_in_success"], after["back_channel_ignored"], after["floor_held"]) >= 0.85
