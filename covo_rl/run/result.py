"""What a run shows: its options at the start; at the end result.json, the table before and after, and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from covo_rl.audio import ClipStore
from covo_rl.config import Options
from covo_rl.data.files import plain, read_record
from covo_rl.data.memory import IN_MEMORY
from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.rewards import Component
from covo_rl.run.report.curves import curves
from covo_rl.train.checkpoint.identity import data_fingerprint
from covo_rl.types import Example


def summary_rows(
    options: Options, rewards: Sequence[Component], files: Mapping[str, Path], sizes: tuple[int, int], model_type: str,
    device: str,
) -> list[tuple[str, Any]]:  # fmt: skip
    """Rows of the table that a run begins with; `sizes` are the numbers of training and held-out rows."""
    train, rollout, gate = options.train, options.rollout, options.reward.reward_gate
    terms = " + ".join(f"{'' if term.weight == 1 else f'{term.weight:g} '}R_{term.name}" for term in rewards)
    sources = [files["data"], files.get("eval_data", files["data"])]
    data, held_out = ("memory" if str(path).startswith(IN_MEMORY) else path for path in sources)
    return [
        ("model", f"{options.model.model} ({model_type})"),
        ("device", device),
        ("data", f"{sizes[0]} rows from {data}"),
        ("held out", f"{sizes[1]} rows from {held_out}"),
        ("step", f"{train.prompts_per_step} prompts x {rollout.num_generations} rollouts, {train.max_steps} steps"),
        ("R_total", terms + ("" if gate == "none" else f", gated by {gate}")),
        ("judge", options.reward.judge or "none: deterministic checkers"),
        ("loss", f"{options.loss.loss_type}, beta {options.loss.beta:g}, lr {train.learning_rate:g}"),
        ("seed", train.seed),
        ("run folder", train.output),
    ]


def before_settings(options: Options, rows: Sequence[Example], clips: ClipStore) -> Any:
    """What the evaluation before training depends on, JSON-ready; `clips` has named those of `rows`."""
    rooms = (options.model, options.adapter, options.prompt, options.rollout, options.reward)
    numbers = options.train.seed, options.eval.eval_num_generations
    return plain([data_fingerprint(rows, clips.key), *(asdict(room) for room in rooms), *numbers])


def stored_before(run: Run, settings: Any) -> dict[str, Any] | None:
    """The summaries in before.json; None where it is missing, damaged, or was made of other rows or options."""
    try:
        stored = read_record(run.folder / "before.json")
    except ValueError:
        return None
    return stored if stored.pop("settings", None) == settings else None


def show_result(run: Run, evaluations: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Any]) -> None:
    """Print held-out figures before and after, and what was heard; draw curves.png. `rows` close the second table."""
    heard = [(f"{audio} audio, sampled", console.interval(evaluations[audio]["sampled"]))
             for audio in ("silent", "swapped")]  # fmt: skip
    try:
        picture: Any = curves(run.metrics(), run.folder / "curves.png")
    except (ImportError, OSError) as error:
        (run.folder / "curves.png").unlink(missing_ok=True)  # half of it
        picture = f"not drawn: {error}"
    console.console.print(console.before_after_table(evaluations["before"], evaluations["after"]), markup=False)
    table = console.summary_table("after training", [*heard, *rows.items(), ("curves", picture)])
    console.console.print(table, markup=False)


def evaluated(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that result.json promises, and every summary under `details`."""

    def figures(summaries: dict[str, Any]) -> dict[str, Any]:
        sampled = summaries["sampled"]
        rewards = {name: value for name, value in sampled.items() if name.startswith("reward_")}
        accuracies = {f"accuracy_{mode}": summaries[mode]["accuracy"] for mode in ("greedy", "sampled")}
        return {**accuracies, **rewards, "n": sampled["n"]}

    return {
        **{when: figures(evaluations[when]) for when in ("before", "after")},
        **{f"after_{audio}_audio": {"accuracy_sampled": evaluations[audio]["sampled"]["accuracy"]}
           for audio in ("silent", "swapped")},
        "details": evaluations,
    }  # fmt: skip
