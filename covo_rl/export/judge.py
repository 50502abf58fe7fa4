"""Is an export the trained policy? Numbers in, a verdict out.

The export's logits must equal those of the trained policy, and differ from those of the base model.
`update_kept` is the share of the policy's change that the export shows: with s = trained - base and
o = export - base over all logits, <s, o> / <s, s>. 1 is the whole change, 0 is none. It survives the rounding of
16-bit weights, which the base has too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: dtype -> largest difference of a logit, as long as no logit exceeds USUAL_LOGIT
FLAT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
USUAL_LOGIT = 10.0
NOISE = 1e-6  # a change below this share of the largest logit is no change
UPDATE_KEPT = 0.5
NOOP = (
    "the export is a no-op: the trained policy equals the base model, so training changed nothing (no updates, a "
    "learning rate of 0, or rewards without differences); covo-rl export --allow-noop writes it all the same"
)


@dataclass(frozen=True)
class Target:
    """One folder to check: an adapter on the base, or a merged model."""

    name: str
    kind: str
    folder: Path
    dtype: str


@dataclass(frozen=True)
class Expected:
    """Prompts as model inputs, and what the trained policy says: logits (KEEP, V) float32 per prompt.

    `base` holds the logits with the adapter disabled; None in full mode, where only the fresh base can tell.
    """

    inputs: list[dict[str, torch.Tensor]]
    trained: list[torch.Tensor]
    base: list[torch.Tensor] | None
    ids: list[str]
    messages: list[list[dict[str, Any]]]
    texts: list[str]


@dataclass
class Verification:
    """What verification.json says about one export. `problems` is empty iff `ok`."""

    ok: bool
    kind: str
    max_abs_logit_diff_trained: float
    max_abs_logit_diff_base: float
    tolerance: float
    update_kept: float
    max_abs_logit: float
    dtype: str
    base_model: str
    prompts: list[str]
    problems: list[str] = field(default_factory=list)
    noop: bool = False
    fresh_process_imports_covo_rl: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    #: `tolerance` is the larger of the first and the second times `max_abs_logit`
    tolerance_flat: float = 0.0
    tolerance_relative: float = 0.0

    def write(self, folder: Path) -> Path:
        path = folder / "verification.json"
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def largest(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference over all prompts; infinite where anything is not finite or shapes differ."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a.shape != b.shape:
            return float("inf")
        gap = (a.double() - b.double()).abs().max().item()
        worst = max(worst, gap if np.isfinite(gap) else float("inf"))
    return worst


def kept(trained: Sequence[torch.Tensor], before: Sequence[torch.Tensor],
         found: Sequence[torch.Tensor], fresh_base: Sequence[torch.Tensor]) -> float:  # fmt: skip
    """<s, o> / <s, s> with s = trained - before and o = found - fresh_base; 0 where the policy did not change."""
    s = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(trained, before, strict=True)])
    o = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(found, fresh_base, strict=True)])
    norm = torch.dot(s, s).item()
    return torch.dot(s, o).item() / norm if norm > 0 else 0.0


def tolerances(kind: str, dtypes: Collection[str]) -> tuple[float, float]:
    """(flat, relative to the largest logit): the larger of the two bounds the difference from the trained policy.

    An adapter in float32 does the policy's own arithmetic, so only the flat 1e-4 counts. Merging adds before it
    multiplies, and 16-bit weights are rounded: errors that grow with the logits. The loosest of `dtypes` counts.
    """
    flat = max(FLAT_TOLERANCE.get(dtype, FLAT_TOLERANCE["float32"]) for dtype in dtypes)
    exact = kind == "adapter" and flat == FLAT_TOLERANCE["float32"]
    return flat, 0.0 if exact else flat / USUAL_LOGIT


def is_idle(expected: Expected) -> bool:
    """True where the trained policy answers as its base, adapter disabled, does; False where that is unknown."""
    if expected.base is None:
        return False
    top = max(t.abs().max().item() for t in expected.trained)
    return largest(expected.trained, expected.base) <= NOISE * max(top, 1.0)


def judge(
    target: Target,
    expected: Expected,
    logits: dict[str, list[torch.Tensor]],
    notes: dict[str, Any],
    *,
    base_model: str,
    allow_noop: bool = False,
    trained_dtype: str | None = None,
) -> Verification:
    """Compare one export with the policy and with the base.

    `trained_dtype`: precision of the policy in memory; the looser tolerance of the two counts.
    """
    found, fresh_base = logits[target.name], logits[f"base.{target.dtype}"]
    before = fresh_base if expected.base is None else expected.base
    top = max(t.abs().max().item() for t in expected.trained)
    flat, relative = tolerances(target.kind, {target.dtype, trained_dtype or target.dtype})
    tolerance = max(flat, relative * top)
    gap, change = largest(found, expected.trained), largest(found, fresh_base)
    share = kept(expected.trained, before, found, fresh_base)
    problems = []
    if not gap <= tolerance:
        problems.append(f"logits differ from the trained policy by {gap:.3g}, tolerance {tolerance:.3g}")
    idle = is_idle(expected) if expected.base is not None else (change == 0.0 and gap <= tolerance)
    if idle and not allow_noop:
        problems.append(NOOP)
    elif not idle and not share >= UPDATE_KEPT:
        problems.append(
            f"the export shows {100 * share:.0f} % of what training changed (update_kept {share:.3g}): it does not "
            f"take effect" + ("" if target.dtype == "float32" else f", or {target.dtype} rounds it away: use float32")
        )
    for kind, keys in notes.get(target.name, {}).items():
        if kind != "rendered" and keys:
            problems.append(f"{kind} on loading: {', '.join(keys[:5])}")
    rendered = notes.get(target.name, {}).get("rendered")
    if rendered is not None and rendered != expected.texts:
        problems.append(f"the exported chat template renders {rendered[0]!r}, training used {expected.texts[0]!r}")
    return Verification(
        not problems, target.kind, gap, change, tolerance, share, top, target.dtype, base_model, expected.ids, problems,
        idle, "covo_rl" in notes["loaded"], notes["versions"], tolerance_flat=flat, tolerance_relative=relative,
    )  # fmt: skip
