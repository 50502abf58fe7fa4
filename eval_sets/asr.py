"""Recognition: error rates over a whole corpus, words of English, characters of Chinese.

English is normalised as Whisper does it; Chinese loses punctuation and spaces and is compared in simplified script.
Rows without a reply count as deletions. The published test sets are known by name; one's own file is a sub-set too.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_speech import read_asr
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

#: sub-set -> (language, rows, error rate of Covo-Audio in %)
PARTS = {
    "librispeech-test-clean": ("en", 2620, 1.45),
    "librispeech-test-other": ("en", 2939, 3.21),
    "fleurs-en": ("en", 647, 5.08),
    "fleurs-zh": ("zh", 945, 6.64),
    "aishell-1": ("zh", 7176, 1.07),
    "wenetspeech-net": ("zh", 24774, 7.23),
    "wenetspeech-meeting": ("zh", 8370, 8.33),
}

SETS = {
    "asr": SpeechSet(
        name="asr",
        title="Speech recognition",
        source="openslr.org/12 (LibriSpeech), openslr.org/33 (AISHELL-1), hf.co/datasets/google/fleurs, WenetSpeech",
        licence="LibriSpeech and Fleurs CC-BY-4.0; AISHELL-1 Apache-2.0; WenetSpeech: ask its authors",
        how_to_get="write JSON lines with id, audio, text, language (en or zh) and subset, or a file a sub-set named "
        f"after it ({', '.join(PARTS)}); --data the file or its folder",
        version="test splits as published",
        read=read_asr,
        open_parts=True,
        subsets=tuple(
            Subset(name, "asr", rows, language, (language,), f"{name}.jsonl", {"Covo-Audio": rate})
            for name, (language, rows, rate) in PARTS.items()
        ),
        published_in={"Covo-Audio": "arXiv 2602.09823"},
    )
}
