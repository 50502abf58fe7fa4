"""URO-Bench: 40 sub-sets of spoken questions, in two tracks and two languages (Yan et al., arXiv 2502.17810).

A reply is audio; it is transcribed (whisper-large-v3, of Chinese paraformer-zh) and judged by gpt-4o-mini with one
prompt a mode. Prompts are the user's. "-zh" sets are Chinese; GaokaoEval is English listening comprehension, with long
silences inside the audio. `groups` are the official means, over {understanding, reasoning, oral} x {basic, pro} x
{en, zh} and each of their marginals.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.aggregate import URO_SETS
from covo_rl.evaluate.speech.layout_dialogue import read_uro
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

#: sub-set -> (mode, rows), in the order of the published tables; which group each is in stands in URO_SETS
PARTS: dict[str, tuple[str, int]] = {
    "Repeat": ("wer", 252), "Summary": ("semi_open", 118), "GaokaoEval": ("qa", 303), "StoralEval": ("semi_open", 201),
    "TruthfulEval": ("semi_open", 470), "Gsm8kEval": ("qa", 582), "MLC": ("qa", 177), "AlpacaEval": ("open", 199),
    "CommonEval": ("open", 200), "WildchatEval": ("open", 349),
    "Repeat-zh": ("wer", 127), "LCSTS-zh": ("semi_open", 119), "HSK5-zh": ("qa", 100), "SQuAD-zh": ("qa", 153),
    "OpenbookQA-zh": ("qa", 189), "APE-zh": ("qa", 190), "MLC-zh": ("qa", 145), "AlpacaEval-zh": ("open", 147),
    "Claude-zh": ("open", 222), "Wildchat-zh": ("open", 299),
    "UnderEmotion-en": ("ue", 137), "CodeSwitching-en": ("semi_open", 70), "Safety-en": ("sf", 25),
    "ClothoEval-en": ("qa", 265), "MuChoEval-en": ("qa", 311), "MLCpro-en": ("qa", 91),
    "MtBenchEval-en": ("multi", 190), "SpeakerAware-en": ("sa", 55), "SRT-en": ("srt", 43),
    "GenEmotion-en": ("ge", 54), "GenStyle-en": ("gs", 44), "Multilingual": ("ml", 1108),
    "UnderEmotion-zh": ("ue", 79), "CodeSwitching-zh": ("semi_open", 70), "Safety-zh": ("sf", 25),
    "MLCpro-zh": ("qa", 64), "SpeakerAware-zh": ("sa", 49), "SRT-zh": ("srt", 25), "GenEmotion-zh": ("ge", 43),
    "GenStyle-zh": ("gs", 39),
}  # fmt: skip

#: model -> scores of the basic track, in the order of PARTS
BASIC_EN = {
    "Covo-Audio-Chat": (95.24, 87.23, 89.11, 82.59, 67.60, 85.68, 77.78, 85.73, 79.67, 86.82),
    "Covo-Audio-Chat-FD": (94.64, 83.45, 73.82, 80.80, 64.51, 80.47, 74.76, 84.25, 75.07, 88.34),
    "Whisper + GPT-4o": (95.24, 96.16, 86.47, 86.97, 78.24, 90.72, 75.71, 98.29, 89.77, 95.74),
    "GLM-4-Voice": (90.95, 91.07, 64.47, 73.80, 59.28, 30.93, 57.82, 80.77, 63.07, 78.76),
    "Freeze-Omni": (70.89, 78.87, 26.29, 57.74, 46.95, 2.81, 42.56, 52.23, 48.70, 55.80),
}
BASIC_ZH = {
    "Covo-Audio-Chat": (98.17, 79.89, 88.00, 77.34, 83.60, 68.42, 80.69, 90.02, 87.18, 90.41),
    "Covo-Audio-Chat-FD": (98.35, 80.72, 83.67, 75.16, 79.37, 70.70, 78.85, 84.90, 83.93, 88.34),
    "Whisper + GPT-4o": (69.35, 85.37, 71.00, 49.23, 80.95, 84.73, 64.82, 96.00, 99.45, 91.82),
    # its board has 96.00 of HSK5-zh, with which its mean of 66.90 cannot be
    "GLM-4-Voice": (92.64, 77.08, None, 28.75, 56.96, 15.78, 78.85, 83.35, 82.12, 84.48),
    "Freeze-Omni": (4.97, 71.82, 7.66, 9.58, 16.40, 11.75, 47.35, 67.98, 64.89, 71.28),
}


def _published() -> dict[str, dict[str, float]]:
    """Sub-set -> model -> score."""
    scores: dict[str, dict[str, float]] = {}
    for language, by_model in (("en", BASIC_EN), ("zh", BASIC_ZH)):
        names = [name for name in PARTS if URO_SETS[name][1:] == ("basic", language)]
        for model, values in by_model.items():
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    scores.setdefault(name, {})[model] = value
    return scores


PUBLISHED = _published()
SETS = {
    "uro-bench": SpeechSet(
        name="uro-bench",
        title="URO-Bench",
        source="github.com/Ruiqi-Yan/URO-Bench @9e74bc0; hf.co/datasets/Honggao/URO-Bench",
        licence="MIT",
        how_to_get="download and unpack URO-Bench-data.zip from hf.co/datasets/Honggao/URO-Bench; --data the folder "
        "that holds basic/ and pro/",
        version="rules @9e74bc0, data edition 2025-08",
        read=read_uro,
        numbered=True,
        subsets=tuple(
            Subset(name, f"uro_{mode}", rows, "multi" if mode == "ml" else URO_SETS[name][2], URO_SETS[name],
                   f"{URO_SETS[name][1]}/{name}/test.jsonl", PUBLISHED.get(name, {}))
            for name, (mode, rows) in PARTS.items()
        ),
        published={
            "basic_en": {"Whisper + GPT-4o": 89.33, "GLM-4-Voice": 69.09, "Freeze-Omni": 48.28},
            "basic_zh": {"Whisper + GPT-4o": 79.27, "GLM-4-Voice": 66.90, "Freeze-Omni": 37.37},
        },
        published_in={
            "Covo-Audio-Chat": "arXiv 2602.09823",
            "Covo-Audio-Chat-FD": "arXiv 2602.09823",
            "Whisper + GPT-4o": "README of URO-Bench @9e74bc0",
            "GLM-4-Voice": "README of URO-Bench @9e74bc0",
            "Freeze-Omni": "README of URO-Bench @9e74bc0",
        },
    )
}  # fmt: skip
