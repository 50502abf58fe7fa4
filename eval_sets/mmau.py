"""MMAU: 10,000 four-choice questions on sound, music and speech (Sakshi et al., arXiv 2410.19168).

test-mini has 1,000 rows with answers; test has 9,000 without, scored by the authors' host (HF Space
sonalkum/MMAU-Eval since 2026-01-30; EvalAI before): `covo-rl eval` writes the file to submit.

The same name covers different keys. The original of October 2024 and v05.15.25 differ in a quarter of the rows,
which moves one model's score by 3 to 6 points, and v05.15.25 itself changed over about ten commits. The authors
publish no hashes: files are told apart by the hash where it is on record in KNOWN_FILES, else by their structure,
and every report carries the sha256 of the file and of the key.

Known defects of the current test-mini: always answering the first option scores 39.5 %, 27 rows have duplicate
options, 52 rows do not have four.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from covo_rl.evaluate.sets import EvalSet, PromptStyle
from covo_rl.types import Example

#: sha256 of a data file -> edition. The authors publish none; put yours here once you have checked where it is from.
KNOWN_FILES: dict[str, str] = {}

#: figure -> model -> accuracy in %, all on v05.15.25
PUBLISHED_MINI = {
    "overall": {
        "Covo-Audio": 75.30, "Step-Audio 2": 77.58, "MiMo-Audio": 74.70, "Audio Flamingo 3": 73.30,
        "Step-Audio 2 mini": 72.73, "Qwen2.5-Omni": 71.50,
    },
    "task: sound": {"Covo-Audio": 78.68}, "task: music": {"Covo-Audio": 76.05}, "task: speech": {"Covo-Audio": 71.17},
}  # fmt: skip
PUBLISHED_TEST = {
    "overall": {"Covo-Audio": 71.89}, "task: sound": {"Covo-Audio": 73.90}, "task: music": {"Covo-Audio": 70.20},
    "task: speech": {"Covo-Audio": 71.56},
}  # fmt: skip

PROMPTS = {
    "official": PromptStyle(
        "{question}  Select one option from the provided choices.\n{list}.", "issue 3 of Sakshi113/MMAU"
    ),
    "r1-aqa": PromptStyle(
        "{question} Please choose the answer from the following options: {list}. "
        "Output the final answer in <answer> </answer>.",
        "xiaomi-research/r1-aqa @5d24f31",
    ),
}


def identify(examples: Sequence[Example]) -> str | None:
    """The edition of a test-mini file from published counts: options, spelling of difficulty, rows of one skill."""
    if len(examples) != 1000:
        return None
    options = Counter(len(e.choices) for e in examples)
    skills = Counter(str(e.columns.get("sub-category", "")).split(" Pattern")[0] for e in examples)
    difficulties = {str(e.columns.get("difficulty", "")) for e in examples}
    if options == {4: 970, 5: 20, 2: 10} or difficulties & {"Medium", "Hard"}:
        return "original, October 2024"
    if options == {4: 948, 2: 27, 5: 24, 8: 1} and skills.get("Phonemic Stress", 0) == 53:
        return "v05.15.25, as of 2025-08-09"
    return {153: "original, as of 2025-03-25", 53: "v05.15.25, one of its commits"}.get(
        skills.get("Phonemic Stress", 0)
    )


def clean(column: str, value: str) -> str:
    """`['Reasoning']`, as 13 rows of test-mini have it, is Reasoning; `Medium` is medium."""
    if column == "category":
        return value.removeprefix("['").removesuffix("']")
    return value.lower() if column in ("difficulty", "task") else value


def _set(
    name: str, split: str, rows: int, has_answers: bool, published: Mapping[str, Mapping[str, float]]
) -> EvalSet:  # fmt: skip
    return EvalSet(
        name=name,
        title=f"MMAU {split}",
        source="github.com/Sakshi113/MMAU @110127f (2026-02-09); hf.co/datasets/gamma-lab-umd/MMAU-" + split,
        licence="Apache-2.0",
        how_to_get=f"download mmau-{split}.json and the {split} audio archive as github.com/Sakshi113/MMAU says; "
        f"--data mmau-{split}.json --audio-dir the folder that holds {split}-audios/",
        prompts=PROMPTS,
        rows=rows,
        has_answers=has_answers,
        known_files=KNOWN_FILES,
        identify=identify if has_answers else lambda examples: None,
        clean=clean,
        submission=not has_answers,
        published=published,
        published_in=dict.fromkeys(published["overall"], "arXiv 2602.09823 (v05.15.25)"),
        published_edition="v05.15.25",
    )


SETS = {
    "mmau-test-mini": _set("mmau-test-mini", "test-mini", 1000, True, PUBLISHED_MINI),
    "mmau-test": _set("mmau-test", "test", 9000, False, PUBLISHED_TEST),
}
