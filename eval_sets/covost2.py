"""CoVoST 2: English or Chinese speech is translated into text of the other (Wang et al., arXiv 2007.10310).

BLEU depends on sacrebleu's tokeniser (zh into Chinese, 13a into English) and on its version.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_speech import read_covost
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

SETS = {
    "covost2": SpeechSet(
        name="covost2",
        title="CoVoST 2",
        source="github.com/facebookresearch/covost; recordings of Common Voice 4.0",
        licence="CC0",
        how_to_get="make covost_v2.en_zh-CN.tsv and covost_v2.zh-CN_en.tsv as its README says; --data a folder with "
        "both, where each has its clips/ beside it or --audio-dir names them",
        version="test split",
        read=read_covost,
        # the report gives 49.84/26.77, without directions; into Chinese is read first, as elsewhere in the literature
        subsets=(
            Subset("en_zh-CN", "translation", 15531, "zh", (), "covost_v2.en_zh-CN.tsv", {"Covo-Audio": 49.84}),
            Subset("zh-CN_en", "translation", 4898, "en", (), "covost_v2.zh-CN_en.tsv", {"Covo-Audio": 26.77}),
        ),
        published_in={"Covo-Audio": "arXiv 2602.09823"},
    )
}
