"""Streams from half-duplex dialogues: pauses, back-channels, barge-ins, noise, side talk, echo.

    dialogue -> Timeline: turns on the clock of chunks -> two channels
    sft    the whole dialogue; the model answers and stops when it should, with the delays of people
    rl     up to one decision: a user's turn that is to be answered, or a reply that is to go on or to stop
    test   as rl, each kind from each dialogue, pauses from 1 to 4 s

Each draw depends on (seed, id) only: another row changes a stream only by the turn that the stream takes from it (side
talk; what the same user goes on with where a dialogue ends and he is to barge in). No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from covo_rl.duplex.data import DuplexStream
from covo_rl.duplex.presets import SimulationPreset, StreamKind
from covo_rl.duplex.sources import SourceDialogue, Surroundings, seeded
from covo_rl.duplex.timeline import Timeline


class Simulator:
    """Streams of a preset from the dialogues of one split.

    `missed`: what was drawn, or is of the preset, and could not be, as a dialogue has no place for it.
    """

    def __init__(
        self,
        dialogues: Sequence[SourceDialogue],
        preset: SimulationPreset,
        seed: int,
        around: Surroundings | None = None,
    ) -> None:
        self.dialogues, self.preset, self.seed = dialogues, preset, seed
        self.around = around or Surroundings(dialogues)
        self.missed: Counter[str] = Counter()

    def streams(self) -> Iterator[tuple[DuplexStream, np.ndarray]]:
        """Each stream with its wave, (T, 2) float32 at 24 kHz.

        Raises:
            AudioError: a recording that cannot be read.
        """
        for dialogue in self.dialogues:
            kinds: Sequence[StreamKind] = list(self.preset.kinds)
            if shares := [share for share in self.preset.kinds.values() if share is not None]:
                rng = seeded(self.seed, self.preset.name, dialogue.id)
                kinds = [kinds[int(rng.choice(len(kinds), p=shares))]]
            for kind in kinds:
                if (made := self.stream(dialogue, kind)) is not None:
                    yield made

    def stream(self, dialogue: SourceDialogue, kind: StreamKind) -> tuple[DuplexStream, np.ndarray] | None:
        """One stream of a kind, None where the dialogue has no place for what the kind needs."""
        name = f"{self.preset.name}-{dialogue.id}" + (f"-{kind}" if self.preset.name == "test" else "")
        line = Timeline(name, dialogue, self.preset, seeded(self.seed, "stream", name), self.around)
        made = line.render(self.seed) if line.follow(kind) else None
        self.missed += line.missed
        self.missed[kind] += made is None and not line.missed[kind]
        return made
