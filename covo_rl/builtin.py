"""What ships with covo_rl: tiny checkpoints and the rendered question set, found by name.

`builtin:tiny` names the checkpoint in checkpoints/tiny. The question set is rendered once, from a seed, to
a cache folder (COVO_RL_CACHE, default ~/.cache/covo_rl) and read like any other data.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from covo_rl.resolve import find

PREFIX = "builtin:"
SPLITS = {"train": 2000, "validation": 400, "test": 400}
SEED = 0


def cache_folder() -> Path:
    """Where rendered clips are kept."""
    return Path(os.environ.get("COVO_RL_CACHE") or Path.home() / ".cache" / "covo_rl")


def resolve_model(name: str) -> str:
    """`builtin:NAME` -> folder of the shipped checkpoint; any other name is returned as it is.

    Raises:
        FileNotFoundError: no shipped checkpoint has this name; the message lists those that exist.
    """
    if not name.startswith(PREFIX):
        return name
    return str(find("checkpoints", name.removeprefix(PREFIX)))


def questions() -> dict[str, Path]:
    """Split name -> JSON file of the built-in set in the MMAU schema, rendered on first use.

    Rendering goes to a temporary folder that is renamed when complete, so a killed run leaves no half set.
    """
    from covo_rl import synth

    folder = cache_folder() / f"questions-v{synth.VERSION}-seed{SEED}-{'-'.join(str(n) for n in SPLITS.values())}"
    paths = {split: folder / f"{split}.json" for split in SPLITS}
    if all(path.is_file() for path in paths.values()):
        return paths
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        synth.render(partial, seed=SEED, **SPLITS)
        if not folder.exists():
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return paths


def reward_files(names: Iterable[str]) -> dict[str, Path]:
    """Reward name -> its file, for those that live in one; their hashes go into the run record."""
    files = {}
    for name in names:
        path = Path(name.rpartition(":")[0]) if name.endswith(".py") or ".py:" in name else None
        if path is None and ":" not in name:
            try:
                path = find("rewards", f"{name}.py")
            except FileNotFoundError:
                continue  # an entry point: its distribution is in the versions
        if path is not None and path.is_file():
            files[name] = path
    return files
