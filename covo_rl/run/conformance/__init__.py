"""Does a family compute what its model computes? Ten points, on any loaded model: tiny and random, or published.

outcomes = check_family(Subject(load_family(path), path))
covo-rl models check PATH [--random]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from covo_rl.run.conformance import hearing, learning, sampling, scoring
from covo_rl.run.conformance.exports import exports
from covo_rl.run.conformance.outcome import Figure, Gap, Outcome, outcome_of
from covo_rl.run.conformance.subject import Subject

Point = Callable[[Subject], Iterable[Figure | Gap]]
#: in the order of docs/models.md; the steps come last, because they move what trains
POINTS: dict[str, Point] = {
    "weights and parts": hearing.weights,
    "slots": hearing.slots,
    "embeddings in any company": hearing.company,
    "packed = plain rows": scoring.packed,
    "text = CausalLM": scoring.text,
    "sampling, greedy, hearing": sampling.sampling,
    "what trains": learning.targets,
    "exports": exports,  # pyright: ignore[reportAssignmentType]  # takes a folder, see check_family
    "no leak": scoring.leaks,
    "three GRPO steps": learning.steps,
}
EXPORTS = "exports"


def check_family(subject: Subject, *, with_exports: bool | None = None) -> Iterator[Outcome]:
    """The outcome of one point after the other.

    `with_exports` None exports what is light; True whatever fits; False leaves the point to the caller, as a gap.
    Nothing is left on disk.
    """
    for name, point in POINTS.items():
        if name != EXPORTS:
            yield outcome_of(name, point(subject))
            continue
        if with_exports is False:
            yield Outcome(name, gaps=(Gap("adapter and merged export", "left out by the caller"),))
            continue
        with tempfile.TemporaryDirectory(prefix="covo-rl-check-") as scratch:
            yield outcome_of(name, exports(subject, Path(scratch), asked=bool(with_exports)))
