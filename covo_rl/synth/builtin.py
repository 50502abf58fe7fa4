"""The built-in question set on disk: rendered once, from a seed, and then read like any other data."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from covo_rl import synth
from covo_rl.resolve import cache_folder

SPLITS = {"train": 2000, "validation": 400, "test": 400}
SEED = 0


def questions() -> dict[str, Path]:
    """Split name -> JSON file of the built-in set in the MMAU schema, rendered on first use.

    Rendering goes to a temporary folder that is renamed when complete, so a killed run leaves no half set.
    """
    folder = cache_folder() / f"questions-v{synth.VERSION}-seed{SEED}-{'-'.join(str(n) for n in SPLITS.values())}"
    paths = {split: folder / f"{split}.json" for split in SPLITS}
    if all(path.is_file() for path in paths.values()):
        return paths
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        synth.render_set(partial, seed=SEED, **SPLITS)
        if not folder.exists():
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return paths
