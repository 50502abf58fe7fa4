"""Does a family compute what its model computes? Ten points, on any loaded model: tiny and random, or published.

outcomes = check_family(Subject(load_family(path), path))
covo-rl models check PATH [--random]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from covo_rl.run.conformance import exports, hearing, learning, sampling, scoring
from covo_rl.run.conformance.outcome import Figure, Gap, PointOutcome, outcome_of
from covo_rl.run.conformance.subject import Subject

#: as docs/models.md lists them; the steps come last, because they move what trains
POINTS: dict[str, Callable[[Subject], Iterable[Figure | Gap]]] = {
    "weights and parts": hearing.weights_and_parts,
    "slots": hearing.slots,
    "embeddings in any company": hearing.company,
    "packed = plain rows": scoring.packed,
    "text = CausalLM": scoring.text,
    "sampling, greedy, hearing": sampling.sampling,
    "what trains": learning.targets,
    "exports": exports.round_trip,
    "no leak": scoring.leaks,
    "three GRPO steps": learning.steps,
}


def check_family(subject: Subject) -> Iterator[PointOutcome]:
    """The outcome of one point after the other; nothing is left on disk."""
    for name, point in POINTS.items():
        yield outcome_of(name, point(subject))
