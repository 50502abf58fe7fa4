"""Seed-TTS-eval: a sentence is said in the voice of a prompt; how many of its words does a transcriber hear?

Anastassiou et al., arXiv 2406.02430. The number is the plain mean over utterances; the official script skips utterances
without audio, so both means are given. The repository has no licence file: its rule is re-implemented, not its code.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_speech import read_seed_tts
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

SETS = {
    "seed-tts": SpeechSet(
        name="seed-tts",
        title="Seed-TTS-eval",
        source="github.com/BytedanceSpeech/seed-tts-eval @752f429",
        licence="no licence file; the recordings are of Common Voice (CC0) and DiDiSpeech-2",
        how_to_get="download seedtts_testset as its README says; --data the folder that holds en/ and zh/",
        version="rules @752f429",
        read=read_seed_tts,
        subsets=(
            Subset("en", "tts", 1088, "en", (), "en/meta.lst", {"Covo-Audio": 2.44}),
            Subset("zh", "tts", 2020, "zh", (), "zh/meta.lst", {"Covo-Audio": 1.73}),
            Subset("zh-hard", "tts", 400, "zh", (), "zh/hardcase.lst"),
        ),
        published_in={"Covo-Audio": "arXiv 2602.09823"},
    )
}
