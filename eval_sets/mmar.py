"""MMAR: 1,000 questions that need several steps of reasoning, on mixed sound, music and speech (arXiv 2505.13032).

Scored by the same words-in-the-reply rule as MMAU (the two scripts agree on every verdict we ran), under the key
`answer_prediction`. The rubric score of the reasoning (MMAR-Rubrics, a judge called five times a row) is not
computed here.
"""

from __future__ import annotations

from covo_rl.evaluate.sets import FIELDS, EvalSet, PromptStyle

SETS = {
    "mmar": EvalSet(
        name="mmar",
        title="MMAR",
        source="github.com/ddlBoJack/MMAR @3bce090 (2026-02-26); hf.co/datasets/BoJack/MMAR",
        licence="CC-BY-NC-4.0",
        how_to_get="download MMAR-meta.jsonl and the audio archive (3 GB) from hf.co/datasets/BoJack/MMAR; "
        "--data MMAR-meta.jsonl --audio-dir the folder that its audio_path starts from",
        fields={**FIELDS, "audio": "audio_path"},
        breakdown=("modality", "category", "sub-category", "language"),
        reply_keys=("answer_prediction",),
        prompts={
            "official": PromptStyle(
                "{question}\nSelect one option from the provided choices:\n{lines}", "issue 3 of ddlBoJack/MMAR"
            )
        },
        rows=1000,
    )
}
