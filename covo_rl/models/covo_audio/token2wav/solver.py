"""From noise to latents along a vector field: explicit midpoint on a fixed grid, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from covo_rl.types import UserError


class LatentError(UserError, ArithmeticError):
    """The latents are not numbers any more; the message says from which step on."""


def midpoint(velocity: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, steps: int) -> torch.Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1 on linspace(0, 1, steps): `steps` - 1 intervals, 2 calls each.

    Raises:
        ValueError: fewer than 2 steps.
        LatentError: NaN or infinite numbers.
    """
    if steps < 2:
        raise ValueError(f"steps={steps}; the solver needs at least 2 points, from noise to latents (published: 10)")
    times = torch.linspace(0, 1, steps, dtype=torch.float64).tolist()
    finite = []  # looked at once, at the end: each look would wait for the device
    for start, end in pairwise(times):
        half = (end - start) / 2
        x = x + (end - start) * velocity(x + half * velocity(x, start), start + half)
        finite.append(x.isfinite().all())
    if not torch.stack(finite).all():
        step = torch.stack(finite).tolist().index(False) + 1
        raise LatentError(f"NaN or infinite latents after step {step} of {steps - 1}: the weights or the prompt are "
                          "damaged, or the dtype too narrow (float32 and bfloat16 are meant)")  # fmt: skip
    return x


def guide(
    conditional: torch.Tensor, unconditional: torch.Tensor, alpha: float, rescale: bool, mask_BZ: torch.Tensor | None
) -> torch.Tensor:
    """v_c + alpha (v_c - v_u), after arXiv 2207.12598; with `rescale`, given the spread of v_c (arXiv 2305.08891).

    Velocities (B, Z, E). The spread is taken over the real frames of each row, so that rows do not depend on others.
    """
    velocity = conditional + alpha * (conditional - unconditional)
    if rescale:
        velocity = velocity * (_spread(conditional, mask_BZ) / _spread(velocity, mask_BZ))
    return velocity


def _spread(v_BZE: torch.Tensor, mask_BZ: torch.Tensor | None) -> torch.Tensor:
    """The unbiased standard deviation of each row, (B, 1, 1)."""
    if mask_BZ is None:
        return v_BZE.std(dim=(1, 2), keepdim=True)
    weight = mask_BZ[..., None].to(v_BZE)
    count = weight.sum(dim=(1, 2), keepdim=True) * v_BZE.shape[-1]
    mean = (v_BZE * weight).sum(dim=(1, 2), keepdim=True) / count
    return (((v_BZE - mean) ** 2 * weight).sum(dim=(1, 2), keepdim=True) / (count - 1)).sqrt()
