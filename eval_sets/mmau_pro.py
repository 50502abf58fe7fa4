"""MMAU-Pro: 5,305 questions on sound, music and speech, up to ten minutes and several clips (arXiv 2508.13992).

A category is a sub-set, found in the rows. Closed questions: the option nearest to the reply by embedding (NV-Embed-v2,
which also picks one for an empty reply), and our strict match beside it. Open ones: a judge, 1-5; a reply of the judge
that cannot be read is missing here, 3.0 in the official script. Instruction following: checks of form.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_questions import read_mmau_pro
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

SETS = {
    "mmau-pro": SpeechSet(
        name="mmau-pro",
        title="MMAU-Pro",
        source="github.com/sonalkum/MMAUPro @960e93a; hf.co/datasets/gamma-lab-umd/MMAU-Pro",
        licence="code: no licence file; data: see its card",
        how_to_get="download test.parquet and the audio archive from hf.co/datasets/gamma-lab-umd/MMAU-Pro; "
        "--data test.parquet --audio-dir the folder that audio_path starts from",
        version="rules @960e93a",
        read=read_mmau_pro,
        rows=5305,
        open_parts=True,
        subsets=(
            Subset("open", "mmau_pro_open", path="test.parquet"),
            Subset("instruction following", "mmau_pro_instruction", path="test.parquet"),
            Subset("closed", "mmau_pro_closed", path="test.parquet"),
        ),
        published={
            "overall": {"Gemini-2.5-Flash": 59.2, "Qwen2.5-Omni": 52.2, "Audio Flamingo 3": 51.7, "human (about)": 78.0}
        },
        published_in=dict.fromkeys(
            ("Gemini-2.5-Flash", "Qwen2.5-Omni", "Audio Flamingo 3", "human (about)"), "README of MMAU-Pro"
        ),
    )
}
