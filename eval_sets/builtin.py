"""The built-in set: the rendered audio questions of covo_rl.synth, in the MMAU schema, scored as MMAU is.

Without --data its held-out test split is rendered on first use (seconds; no download). It shares no clip with the
training split of the same seed.
"""

from __future__ import annotations

from pathlib import Path

from covo_rl.evaluate.sets import EvalSet


def prepare() -> tuple[Path, Path]:
    """(questions, audio folder) of the held-out split, rendered where they are not yet."""
    from covo_rl.synth import builtin_questions

    path = builtin_questions()["test"]
    return path, path.parent


SETS = {
    "builtin": EvalSet(
        name="builtin",
        title="covo_rl built-in questions, test split",
        source="covo_rl/synth, rendered from seed 0",
        licence="Apache-2.0",
        how_to_get="nothing to get: leave --data out, or render your own with `python -m covo_rl.synth FOLDER`",
        prepare=prepare,
    )
}
