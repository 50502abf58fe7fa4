"""A tiny random model of every family, ready for the points of covo_rl/run/conformance."""

from __future__ import annotations

from covo_rl.models import load_family
from covo_rl.models.builtin import resolve_model
from covo_rl.run.conformance import Subject


def subject_of(name: str) -> Subject:
    path = resolve_model(f"builtin:tiny_{name}")
    return Subject(load_family(path), path, exports=False)
