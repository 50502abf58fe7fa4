"""VCB Bench: Chinese (and some English) real speech; instructions, dialogue, knowledge, robustness (arXiv 2510.11098).

Its repository is not read here. Instruction and dialogue parts are judged 1-5, scaled to 100, and knowledge parts for
correctness; which part is which the user's manifest says, with judge prompts of the user's. A score is marked
`unverified-rule` and is no published number.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_dialogue import read_vcb
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

COVO = {
    "TIF": 93.07, "TIF-En": 89.94, "SIF": 67.41, "SIF-En": 60.86, "MTD": 87.70, "GK": 49.95, "ML": 79.34, "DC": 64.95,
    "SV": 88.94, "EV": 87.13, "CV": 90.37,
}  # fmt: skip
#: knowledge parts, which are judged for correctness; a manifest has the last word
KNOWLEDGE = ("GK", "ML")
PARTS = (*COVO, "SC")

SETS = {
    "vcb-bench": SpeechSet(
        name="vcb-bench",
        title="VCB Bench",
        source="arXiv 2510.11098; hf.co/datasets/tencent/VCB-Bench",
        licence="see its card: hf.co/datasets/tencent/VCB-Bench",
        how_to_get="download hf.co/datasets/tencent/VCB-Bench, write JSON lines (id, audio, text, reference) and a "
        "manifest.yaml beside them: part -> {kind: judge-5 or judge-yes-no, file: PART.jsonl}; --data its folder",
        version="by the user's manifest, unverified rule",
        read=read_vcb,
        open_parts=True,
        subsets=tuple(
            Subset(name, "judge_yes_no" if name in KNOWLEDGE else "judge_5", None,
                   "en" if name.endswith("-En") else "zh", (), f"{name}.jsonl",
                   {"Covo-Audio-Chat": COVO[name]} if name in COVO else {})
            for name in PARTS
        ),
        published_in={"Covo-Audio-Chat": "arXiv 2602.09823"},
    )
}  # fmt: skip
