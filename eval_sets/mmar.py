"""MMAR: 1,000 questions that need several steps of reasoning, on mixed sound, music and speech (arXiv 2505.13032).

`mmar` is scored by the same words-in-the-reply rule as MMAU (the two scripts agree on every verdict we ran), under the
key `answer_prediction`.

`mmar-rubrics` scores the reasoning (Interspeech 2026 Audio Reasoning Challenge, arXiv 2602.14224): 0 where that rule
finds the answer wrong, else a judge (gpt-4o-2024-11-20, temperature 0) scores the `thinking_prediction` by each
criterion of this very question's rubric: the sum over the largest possible one. Of five calls the highest and the
lowest are dropped and the other three averaged. A rubric is a field of each row of the file of 2026-02.
"""

from __future__ import annotations

from covo_rl.evaluate.sets import FIELDS, EvalSet, PromptStyle
from covo_rl.evaluate.speech.layout_questions import read_mmar_rubrics
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

SOURCE = "github.com/ddlBoJack/MMAR @3bce090 (2026-02-26); hf.co/datasets/BoJack/MMAR"
HOW_TO_GET = (
    "download MMAR-meta.jsonl and the audio archive (3 GB) from hf.co/datasets/BoJack/MMAR; "
    "--data MMAR-meta.jsonl --audio-dir the folder that its audio_path starts from"
)

#: Covo-Audio's accuracies in %, by the names of the file
COVO = {
    "overall": 55.30, "modality: sound": 57.58, "modality: music": 41.26, "modality: speech": 62.50,
    "modality: mix-sound-music": 36.36, "modality: mix-sound-speech": 59.17, "modality: mix-music-speech": 58.54,
    "modality: mix-sound-music-speech": 62.50,
}  # fmt: skip

SETS = {
    "mmar": EvalSet(
        name="mmar",
        title="MMAR",
        source=SOURCE,
        licence="CC-BY-NC-4.0",
        how_to_get=HOW_TO_GET,
        fields={**FIELDS, "audio": "audio_path"},
        breakdown=("modality", "category", "sub-category", "language"),
        reply_keys=("answer_prediction",),
        prompts={
            "official": PromptStyle(
                "{question}\nSelect one option from the provided choices:\n{lines}", "issue 3 of ddlBoJack/MMAR"
            )
        },
        rows=1000,
        published={name: {"Covo-Audio": score} for name, score in COVO.items()}
        | {"overall": {"Covo-Audio": COVO["overall"], "Qwen2.5-Omni": 56.70}},
        published_in=dict.fromkeys(("Covo-Audio", "Qwen2.5-Omni"), "arXiv 2602.09823"),
    ),
    "mmar-rubrics": SpeechSet(
        name="mmar-rubrics",
        title="MMAR-Rubrics",
        source=SOURCE,
        licence="CC-BY-NC-4.0",
        how_to_get=f"{HOW_TO_GET}; the file of the repository, whose rows have a rubric",
        version="rules @3bce090",
        read=read_mmar_rubrics,
        subsets=(
            Subset(
                "mmar-rubrics", "mmar_rubrics", 1000, path="MMAR-meta.jsonl",
                published={"xianghe (best single model)": 65.29, "TalTech (best agent)": 69.83},
            ),
        ),
        published_in=dict.fromkeys(
            ("xianghe (best single model)", "TalTech (best agent)"), "audio-reasoning-challenge.github.io/leaderboard"
        ),
    ),
}  # fmt: skip
