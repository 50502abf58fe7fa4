"""Point 8: adapter and merged export, loaded in a fresh process by plain transformers and PEFT.

questions = write_exports(subject, folder)        the exports, and what the process needs
answer_questions([...], own=...)                  one process for any number of models
exports_judged(subject, folder)                   the figures
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from covo_rl.export.adapter import save_policy
from covo_rl.export.merged import write_merged
from covo_rl.export.questions import Target, answer_questions, is_ours, read_answers, write_questions
from covo_rl.export.verify import ask_policy, compare_logits
from covo_rl.run.conformance.outcome import Figure, Gap
from covo_rl.run.conformance.subject import LIGHT, Subject
from covo_rl.types import UserError

KINDS = ("adapter", "merged")


def round_trip(subject: Subject) -> Iterator[Figure | Gap]:
    """Both equal the policy within the tolerance of their precision, and differ from the base."""
    with tempfile.TemporaryDirectory(prefix="covo-rl-check-") as folder:
        scratch = Path(folder)
        if why := _no_room(subject, scratch):
            yield Gap("adapter and merged export", why)
            return
        yield from write_exports(subject, scratch)
        answer_questions([scratch], own=is_ours(subject.family))
        yield from exports_judged(subject, scratch)


def _no_room(subject: Subject, scratch: Path) -> str:
    """Why nothing is exported here, or nothing."""
    size = subject.nbytes
    if subject.folder is None:
        return "the model was made in memory, and an export needs a base in a folder"
    if subject.exports is False:
        return "left out, as asked"
    if size > LIGHT and not subject.exports:
        return f"it needs {size / 1e9:.1f} GB more of memory and of disk; --exports does it"
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(scratch).free
    if 1.2 * size > memory:
        return f"a second copy needs {1.2 * size / 1e9:.1f} GB of memory, {memory / 1e9:.1f} GB are free"
    if 1.1 * size > disk:
        return f"the merged model needs {1.1 * size / 1e9:.1f} GB of disk, {disk / 1e9:.1f} GB are free"
    return ""


def write_exports(subject: Subject, scratch: Path) -> Iterator[Gap]:
    """Both exports into `scratch`, with the questions to them; a kind that cannot be made is a gap."""
    targets, prompts = [], [prompt for prompt in subject.prompts if prompt.clip_keys]
    name = str(subject.dtype).removeprefix("torch.")
    for kind in KINDS:
        folder = scratch / kind
        folder.mkdir()
        try:
            if kind == "adapter":
                save_policy(subject.trainable, folder)
            else:
                write_merged(subject.family, folder)
        except UserError as error:
            yield Gap(f"{kind} export", str(error))
            continue
        targets.append(Target(kind, kind, folder, name))
    write_questions(scratch, subject.family, str(subject.folder), targets, prompts, subject.clips)


def exports_judged(subject: Subject, scratch: Path) -> Iterator[Figure | Gap]:
    """The answers of the fresh process against the policy in memory."""
    expected = ask_policy(subject.trainable, [p for p in subject.prompts if p.clip_keys], subject.clips)
    logits, notes = read_answers(scratch)
    name = str(subject.dtype).removeprefix("torch.")
    for kind in (kind for kind in KINDS if kind in logits):
        target = Target(kind, kind, scratch / kind, name)
        result = compare_logits(target, expected, logits, notes, base_model=str(subject.folder))
        yield Figure(f"{kind}: logits in a fresh process, difference", result.max_abs_logit_diff_trained,
                     result.tolerance, "; ".join(result.problems) or "other names or shapes in the files")  # fmt: skip
        yield Figure(f"{kind}: share of the update that shows", result.update_kept, 0.99, "keys were not loaded: their "
                     "names are not the published ones", least=True)  # fmt: skip
        others = [problem for problem in result.problems if "logits differ" not in problem]
        yield Figure(f"{kind}: further problems", len(others), 0, "; ".join(others))
