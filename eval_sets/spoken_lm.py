"""What a spoken language model finds probable: sWUGGY, sBLIMP (ZeroSpeech 2021) and the topic StoryCloze (tSC).

A pair is a word and a non-word, or a sentence and one with a fault, in several voices: right where the log-probs of its
audio codes, summed or divided by their number, are higher; one half where they are equal. A story (arXiv 2305.13009) is
a prompt and two endings, in audio (a) or text (t): tsc-a2t hears the prompt and reads the endings.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_likelihood import read_spoken_lm
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

TSC = {"tsc-a2a": 83.3, "tsc-a2t": 95.7, "tsc-t2t": 99.4}

SETS = {
    "spoken-lm": SpeechSet(
        name="spoken-lm",
        title="sWUGGY, sBLIMP, tSC",
        source="zerospeech.com (2021 edition); github.com/slp-rl/SpokenStoryCloze",
        licence="see each set's own terms",
        how_to_get="download the ZeroSpeech 2021 data set; --data the folder that holds lexical/ and syntactic/; of "
        "tSC write tsc.jsonl there (covo_rl/evaluate/speech/layout_likelihood.py)",
        version="ZeroSpeech 2021, dev; tSC of arXiv 2305.13009",
        read=read_spoken_lm,
        subsets=(
            Subset("swuggy", "pairs", path="lexical/dev/gold.csv", published={"Covo-Audio": 74.90}),
            Subset("sblimp", "pairs", path="syntactic/dev/gold.csv", published={"Covo-Audio": 61.6}),
            *(
                Subset(name, "tsc", groups=("tsc",), path="tsc.jsonl", published={"Covo-Audio": score})
                for name, score in TSC.items()
            ),
        ),
        published_in={"Covo-Audio": "arXiv 2602.09823, its base model"},
    )
}
