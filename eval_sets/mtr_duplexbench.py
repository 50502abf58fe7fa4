"""MTR-DuplexBench, its conversational features: turns, interruptions, pauses, background speech over many rounds.

He Zhang et al., arXiv 2511.10262. The Covo-Audio report states its full-duplex table by these rules. Success, latency
and frequency of each scenario are functions of the word times of the model's channel (whisper-timestamped medium.en).
Its parts on instruction following, safety and quality are judged by GPT-4o and not read here.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_duplex import read_mtr
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

#: scenario -> (kind, published success %)
PARTS = {
    "smooth": ("mtr_turn", {"Covo-Audio-Chat-FD": 99.7, "Moshi": 96.8, "Freeze-Omni": 99.1}),
    "interruption": ("mtr_interruption", {"Covo-Audio-Chat-FD": 96.81}),
    "pause": ("mtr_pause", {"Covo-Audio-Chat-FD": 97.6, "Moshi": 53.2, "Freeze-Omni": 51.2}),
    "background": ("mtr_background", {}),
}

SETS = {
    "mtr-duplexbench": SpeechSet(
        name="mtr-duplexbench",
        title="MTR-DuplexBench",
        source="github.com/ZhangHe0918/MTR-DuplexBench @6d7c125; hf.co/datasets/Jeff0918/MTR-DuplexBench",
        licence="Apache-2.0",
        how_to_get="clone hf.co/datasets/Jeff0918/MTR-DuplexBench and write its Scenarios_encoding/single_scenario "
        "files as smooth.jsonl, interruption.jsonl, pause.jsonl and background.jsonl, a row a turn "
        "(covo_rl/evaluate/speech/layout_duplex.py); --data their folder",
        version="rules @6d7c125",
        read=read_mtr,
        subsets=tuple(
            Subset(name, kind, path=f"{name}.jsonl", published=scores) for name, (kind, scores) in PARTS.items()
        ),
        # the report calls one column back-channel, and no scenario of the benchmark bears that name
        published={"back-channel": {"Covo-Audio-Chat-FD": 93.89}},
        published_in=dict.fromkeys(("Covo-Audio-Chat-FD", "Moshi", "Freeze-Omni"), "arXiv 2602.09823"),
    )
}
