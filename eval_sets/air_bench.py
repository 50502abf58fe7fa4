"""AIR-Bench: 19 tasks of choices on speech, sound and music (foundation), and open questions (chat); arXiv 2402.07729.

Foundation is MMSU's letter rule with three differences: an empty reply leaves the denominator too, of equal options
only the first is right, a letter beyond the options is wrong. Every task and data set is a sub-set, found in the rows.
Chat: gpt-4-0125-preview compares with a reference reply, in both orders.
"""

from __future__ import annotations

from covo_rl.evaluate.speech.layout_questions import read_air
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

#: the five foundation tasks of the Covo-Audio report, which names no data sets; their mean is 80.86
COVO = {"language id": 99.30, "gender": 91.52, "emotion": 72.30, "age": 70.90, "speaker count": 70.30}
#: their names in Foundation_meta.json, spelled as there; ours is the mean over the data sets of a task
TASKS = {
    "language id": "Spoken_Language_Identification", "gender": "Speaker_Gender_Recognition",
    "emotion": "Speaker_Emotion_Recontion", "age": "Speaker_Age_Prediction",
    "speaker count": "Speaker_Number_Verification",
}  # fmt: skip

SETS = {
    "air-bench": SpeechSet(
        name="air-bench",
        title="AIR-Bench",
        source="github.com/OFA-Sys/AIR-Bench @9832476; hf.co/datasets/qyang1021/AIR-Bench-Dataset",
        licence="Apache-2.0 (code); see the data's card",
        how_to_get="download hf.co/datasets/qyang1021/AIR-Bench-Dataset; --data the folder that holds "
        "Foundation_meta.json and the folders TASK_DATASET, or Chat_meta.json and its own, or a file of results",
        version="rules @9832476",
        read=read_air,
        open_parts=True,
        subsets=(
            Subset("foundation", "air_foundation", path="Foundation_meta.json"),
            Subset("chat", "air_chat", path="Chat_meta.json"),
        ),
        published={name: {"Covo-Audio": score} for name, score in COVO.items()},
        figure_groups=TASKS,
        published_in={"Covo-Audio": "arXiv 2602.09823"},
    )
}
