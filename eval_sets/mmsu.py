"""MMSU: 5,000 questions in 47 tasks on how speech is spoken (arXiv 2506.04779).

The answer is an option's text, the official script reads a letter: the first character of the reply, else the
second-last. So `Dog` is D, `Answer: B` is A, and `The answer is A` leaves numerator and denominator. Both
denominators are reported. (VoiceBench's `mmsu` is another set.)
"""

from __future__ import annotations

from covo_rl.evaluate.sets import FIELDS, EvalSet, PromptStyle

SETS = {
    "mmsu": EvalSet(
        name="mmsu",
        title="MMSU",
        source="github.com/dingdongwang/MMSU @217d1d3 (2026-02-12); hf.co/datasets/ddwang2000/MMSU",
        licence="not stated by its authors: ask before you redistribute",
        how_to_get="download the JSONL and the audio from hf.co/datasets/ddwang2000/MMSU (split train); "
        "--data FILE.jsonl --audio-dir the folder that its audio column starts from",
        fields={**FIELDS, "audio": "audio", "choices": "choice_a choice_b choice_c choice_d", "answer": "answer_gt"},
        breakdown=("category", "sub-category", "sub-sub-category", "linguistics_sub_discipline", "task_name"),
        scorer_rule="letter",
        official_drops="replies that are no text or in which no letter A-D is first or second-last",
        reply_keys=("response",),
        prompts={
            "official": PromptStyle(
                "Choose the most suitable answer from options A, B, C, and D. "
                "You must respond with only A, B, C, or D.\n{question}\n{letters}",
                "dingdongwang/MMSU @217d1d3",
            )
        },
        rows=5000,
        published={
            "overall": {
                "Covo-Audio": 66.64, "Qwen2.5-Omni": 60.57, "Kimi-Audio": 59.28, "Audio Flamingo 3": 61.40,
            },
            "category: Perception": {"Covo-Audio": 58.95, "Qwen2.5-Omni": 42.50, "Kimi-Audio": 43.52},
            "category: Reasoning": {"Covo-Audio": 74.83, "Qwen2.5-Omni": 79.83, "Kimi-Audio": 76.03},
        },
        published_in=dict.fromkeys(
            ("Covo-Audio", "Qwen2.5-Omni", "Kimi-Audio", "Audio Flamingo 3"), "arXiv 2602.09823"
        ),
    )
}  # fmt: skip
