"""`covo-rl models check`: load a model, hold it to the points one after the other, print the table."""

from __future__ import annotations

from typing import Any

from covo_rl.data.noise import quiet, quiet_bars
from covo_rl.data.terminal import say
from covo_rl.models import ModelError, family_class, load_family, model_config, use_family
from covo_rl.models.builtin import TINY_MODELS, resolve_model
from covo_rl.models.registry import family_types
from covo_rl.records.console import console
from covo_rl.resolve import BUILTIN
from covo_rl.run.conformance import POINTS, PointOutcome, Subject, outcome_of
from covo_rl.run.conformance.table import outcome_table, tally
from covo_rl.train.launch import device_of
from covo_rl.types import visible


def check_checkpoint(
    path: str, *, family: str | None = None, dtype: str = "auto", device: str = "auto", exports: bool | None = None,
    trust_remote_code: bool = False,
) -> list[PointOutcome]:  # fmt: skip
    """Print what every point measures on the model at `path`; nothing of it is changed, and nothing is left behind.

    Raises:
        UserError, OSError: it does not load, or the device is not there.
    """
    import peft
    import torch
    import transformers

    quiet()
    quiet_bars()
    place = device_of(device)
    folder = resolve_model(path)
    use_family(family, folder)
    loaded = load_family(folder, dtype, trust_remote_code=trust_remote_code)
    model: Any = loaded.model
    model.to(place)
    subject = Subject(loaded, folder, exports=exports)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, peft))
    kind, count = type(loaded), sum(parameter.numel() for parameter in model.parameters())
    say(f"{visible(path)}: {kind.__module__}:{kind.__name__}, {count:,} parameters in "
        f"{str(subject.dtype).removeprefix('torch.')} on {place}; {versions}")  # fmt: skip
    outcomes = []
    for name, point in POINTS.items():
        outcomes.append(outcome_of(name, point(subject)))
        say(f"  {name}: {outcomes[-1].state}, {outcomes[-1].seconds:.1f} s", err=True)
    console.print(outcome_table(visible(path), outcomes))
    say(tally(outcomes))
    return outcomes


def tiny_of(name: str) -> str:
    """`builtin:tiny_NAME` of a family, by its name or by a model of it.

    Raises:
        ModelError, OSError: no such family or model, or no tiny one of it.
    """
    kind = name if name in family_types() else str(model_config(resolve_model(name)).get("model_type"))
    same = family_class(kind)
    for tiny in (kind, *TINY_MODELS):  # a thinker alone, and variants, have model types of their own
        if tiny in TINY_MODELS and issubclass(same, family_class(tiny)):
            return f"{BUILTIN}tiny_{tiny}"
    raise ModelError(
        f"{name}: there is no tiny random model of {kind}, there are {', '.join(TINY_MODELS)}. For a family of your "
        "own make a folder with few layers and random weights, and check that"
    )
