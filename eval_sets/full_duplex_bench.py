"""Full-Duplex-Bench v1.0 and v1.5: when does a model take the turn? (Lin et al., arXiv 2503.04721 and 2507.23159.)

Figures are functions of the words of a time-synchronous output.wav, whose times a transcriber gives, or of the turns of
a live session. v1.5 puts speech of four sorts over the model's own. The repository is under CC-BY-NC-4.0: its rules are
re-implemented, none of its code is here, and inputs and outputs are paired by their folder, not by the order of two
listings.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_duplex import read_fdb
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

#: sub-set, which is also its folder -> (kind, rows, version)
PARTS = {
    "candor_pause_handling": ("fdb_pause", 216, "v1.0"),
    "synthetic_pause_handling": ("fdb_pause", 137, "v1.0"),
    "candor_turn_taking": ("fdb_turn_taking", 119, "v1.0"),
    "icc_backchannel": ("fdb_backchannel", 55, "v1.0"),
    "synthetic_user_interruption": ("fdb_interruption", 200, "v1.0"),
    "user_interruption": ("fdb_overlap", 200, "v1.5"),
    "user_backchannel": ("fdb_overlap", 99, "v1.5"),
    "talking_to_other": ("fdb_overlap", 100, "v1.5"),
    "background_speech": ("fdb_overlap", 100, "v1.5"),
}

SETS = {
    "full-duplex-bench": SpeechSet(
        name="full-duplex-bench",
        title="Full-Duplex-Bench",
        source="github.com/DanielLin94144/Full-Duplex-Bench @d7336bd",
        licence="CC-BY-NC-4.0 (data and code); CANDOR and ICC recordings have terms of their own",
        how_to_get="download v1.0 and v1.5 as the repository's v1_v1.5/dataset/README.md says; --data the folder that "
        f"holds the folders {', '.join(PARTS)}",
        version="rules @d7336bd",
        read=read_fdb,
        subsets=tuple(
            Subset(name, kind, rows, groups=(version,), path=name) for name, (kind, rows, version) in PARTS.items()
        ),
    )
}
