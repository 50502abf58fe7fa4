"""VoiceBench: spoken prompts to assistants whose replies are text (Chen et al., arXiv 2410.17196).

Open questions and questions with a reference are judged by gpt-4o-mini (three calls); a letter is read by the user's
list of phrases or, without it, strictly, and never guessed; safety is the share of refusals. Its ifeval, mtbench and
bbh are not read here. `mmsu` is MMLU-Pro spoken, not the set of that name.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_dialogue import read_voicebench
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

#: sub-set -> (kind, rows, published)
PARTS = {
    "alpacaeval": ("open", 199, {}),
    "alpacaeval_full": ("open", 636, {"Whisper-v3-large + GPT-4o": 4.80, "Qwen2.5-Omni-7B": 4.49}),
    "commoneval": ("open", 200, {"Whisper-v3-large + GPT-4o": 4.47, "Qwen2.5-Omni-7B": 3.93}),
    "sd-qa": ("qa", 553, {"Whisper-v3-large + GPT-4o": 75.77, "Qwen2.5-Omni-7B": 55.71}),
    "openbookqa": ("mcq", 455, {"Whisper-v3-large + GPT-4o": 92.97, "Qwen2.5-Omni-7B": 81.10}),
    "mmsu": ("mcq", 3074, {"Whisper-v3-large + GPT-4o": 81.69, "Qwen2.5-Omni-7B": 61.32}),
    "advbench": ("harm", 520, {"Whisper-v3-large + GPT-4o": 98.27, "Qwen2.5-Omni-7B": 99.42}),
}

SETS = {
    "voicebench": SpeechSet(
        name="voicebench",
        title="VoiceBench",
        source="github.com/MatthewCYM/VoiceBench @5338154; hf.co/datasets/hlt-lab/voicebench",
        licence="Apache-2.0",
        how_to_get="download hf.co/datasets/hlt-lab/voicebench and write alpacaeval.jsonl ... with prompt, reference "
        "and audio; --data their folder, or a file of results with --subset",
        version="rules @5338154",
        read=read_voicebench,
        subsets=tuple(
            Subset(name, f"voicebench_{kind}", rows, path=f"{name}.jsonl", published=scores)
            for name, (kind, rows, scores) in PARTS.items()
        ),
        published_in=dict.fromkeys(
            ("Whisper-v3-large + GPT-4o", "Qwen2.5-Omni-7B"), "README of VoiceBench @1835c55 (sd-qa by its two judges)"
        ),
    )
}
