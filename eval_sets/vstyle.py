"""VStyle: does a voice follow the style that is asked for? English and Chinese (Zhan et al., arXiv 2509.09716).

An audio judge (gemini-2.5-pro-preview-06-05) hears the reply: 1 the content failed, 2 the content alone, 3 the style in
part, 4 in full but unnatural, 5 natural. Prompt files are the user's. A category counts a quarter; in the first,
composite_properties counts half of it. The judge rewards wording, not voice (its authors warn): read the score beside
that of the same text in a neutral synthetic voice.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.aggregate import VSTYLE
from covo_rl.evaluate.speech.layout_dialogue import read_vstyle
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

ABILITIES = {category: tuple(names.split()) for category, names in VSTYLE.items()}
#: of empathy, in its order
COVO = {"en": (4.86, 4.83, 4.97, 4.80), "zh": (4.89, 4.93, 5.00, 4.89)}


def _subset(language: str, category: str, ability: str) -> Subset:
    scores = dict(zip(ABILITIES["empathy"], COVO[language], strict=True)) if category == "empathy" else {}
    published = {"Covo-Audio-Chat": scores[ability]} if ability in scores else {}
    name, path = f"{language}/{category}/{ability}", f"{language}/metadata.jsonl"
    return Subset(name, "vstyle", None, language, (category, language), path, published)


SETS = {
    "vstyle": SpeechSet(
        name="vstyle",
        title="VStyle",
        source="github.com/alibaba/voice-gen-eval @70fa91a; hf.co/datasets/zhanjun/VStyle",
        licence="MIT",
        how_to_get="download hf.co/datasets/zhanjun/VStyle; --data the folder that holds en/metadata.jsonl and "
        "zh/metadata.jsonl",
        version="rules @70fa91a",
        read=read_vstyle,
        open_parts=True,
        subsets=tuple(
            _subset(language, category, ability)
            for language in ("en", "zh")
            for category, abilities in ABILITIES.items()
            for ability in abilities
        ),
        published={"en": {"GPT-4o": 4.05}, "zh": {"Doubao": 4.10}},
        published_in={
            "Covo-Audio-Chat": "arXiv 2602.09823", "GPT-4o": "VStyle's board @70fa91a",
            "Doubao": "VStyle's board @70fa91a",
        },
    )
}  # fmt: skip
