"""Taking turns, simulated: two-channel streams of digit speech, each of which asks when the model speaks.

A user's turn with a pause of 1 to 4 s in it, one without, a back-channel, a barge-in, a reply that nothing disturbs, of
each dialogue of voices that no training stream has. Rendered on first use (half a minute; no download). With --data a
folder of streams of one's own, as `covo-rl data simulate-duplex` writes them: OUT/test.
"""

from __future__ import annotations

from pathlib import Path

from covo_rl.evaluate.sets import EvalSet

DIALOGUES = 40


def prepare() -> tuple[Path, Path]:
    """The folder of the streams, twice; rendered where they are not yet."""
    from covo_rl.duplex.simulated_set import builtin_test_streams

    folder = builtin_test_streams(DIALOGUES)
    return folder, folder


SETS = {
    "duplex": EvalSet(
        name="duplex",
        title="covo_rl duplex streams, test preset",
        source="covo_rl/duplex, simulated from digit speech of covo_rl/synth, seed 0",
        licence="Apache-2.0",
        how_to_get="nothing to get: leave --data out, or give OUT/test of `covo-rl data simulate-duplex`",
        breakdown=("kind", "longest pause"),
        official_drops="nothing",
        prepare=prepare,
        streams=True,
    )
}
