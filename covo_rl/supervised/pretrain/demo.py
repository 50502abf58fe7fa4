"""The tiny world from end to end: a text model learns to hear, to speak, to go on, and a voice without dialogues.

    world -> text model + encoder -> base -> stage 1 -> stage 2 -> speaker       controls: plain | no_voice | taught

Every part is a folder of OUT and is not repeated where it is finished. CPU seconds of each are kept beside its figures.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from covo_rl.data.files import read_json_lines, write_json
from covo_rl.data.noise import quiet
from covo_rl.data.terminal import say
from covo_rl.models import load_family
from covo_rl.records.console import console
from covo_rl.resolve import find
from covo_rl.speech import SHIPPED_TOKENIZER
from covo_rl.speech.rows import read_speech_rows
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.supervised.pretrain.config import read_pretrain
from covo_rl.supervised.pretrain.create import Creation, create_model
from covo_rl.supervised.pretrain.run import RESULT, run_pretraining
from covo_rl.supervised.pretrain.text_model import make_text_model
from covo_rl.supervised.pretrain.voice_figures import VoiceMeasure
from covo_rl.supervised.pretrain.world import WorldSizes, write_world
from covo_rl.supervised.pretrain.world_figures import Measure, by_document
from covo_rl.synth.counting import NAMES, NEW

DATA = "data/world"
ENCODER = "builtin:tiny_spoken"
FIGURES = "figures.json"
#: what a control's tasks weigh, in the place of those of the configuration
PLAIN = {"interleave_1": 0, "interleave_2": 0}
NO_VOICE = {"pseudo_dialogue": 0}


@dataclasses.dataclass(frozen=True)
class DemoRun:
    """A training: the configuration, its stage, where it starts, and what a control changes.

    `shorter`: by the share of the tokens that `weights` take away, so that the other tasks have as many as before.
    """

    config: str
    start: str
    stage: int | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shorter: bool = False


RUNS = {
    "stage_1": DemoRun("pretrain_tiny", "base", 1),
    "stage_2": DemoRun("pretrain_tiny", "stage_1", 2),
    "speaker": DemoRun("speaker_tiny", "stage_2"),
}
CONTROLS = {
    "stage_2_plain": DemoRun("pretrain_tiny", "stage_1", 2, PLAIN),
    "speaker_no_voice": DemoRun("speaker_tiny", "stage_2", weights=NO_VOICE, shorter=True),
    "speaker_text_taught": DemoRun("speaker_tiny", "stage_2", options={"text_loss": True}),
}


def run_pretrain_demo(
    output: Path, *, seed: int = 0, controls: bool = False, sizes: WorldSizes | None = None,
    steps: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make, train and measure; returns what OUT/figures.json holds. `steps`: of parts, in the place of their own."""
    quiet()
    steps = steps or {}
    parts = _Parts(output)
    tokenizer = SpeechTokenizer.from_pretrained(SHIPPED_TOKENIZER)
    world = output / "world"
    parts.make("world", lambda: _count(write_world(world, tokenizer, seed, sizes)))
    parts.make("text_model", lambda: _text_model(world, output / "text_model", seed, steps.get("text_model", 600)))
    parts.make("base", lambda: create_model(Creation(
        llm=str(output / "text_model"), encoder=ENCODER, output=str(output / "base"), codes=len(tokenizer.codebook),
        adapter_hidden=256, seed=seed)))  # fmt: skip
    judge = _Judge(parts, output, tokenizer)
    judge.measure("base")
    for name, run in {**RUNS, **(CONTROLS if controls else {})}.items():
        parts.make(name, lambda name=name, run=run: _train(output, name, run, seed, steps.get(name)))
        judge.measure(name)
    write_json(output / FIGURES, parts.figures)
    console.print(_table(parts.figures))
    say(f"{output / FIGURES}")
    return parts.figures


class _Parts:
    """What is finished, by name, in OUT/figures.json."""

    def __init__(self, output: Path) -> None:
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        path = output / FIGURES
        self.figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def make(self, name: str, function: Callable[[], Mapping[str, Any]]) -> None:
        """Do it once, and keep what it returns with its CPU seconds."""
        if name in self.figures:
            return
        say(f"== {name}")
        begun = time.process_time()
        made = function()
        self.figures[name] = {**made, "cpu_seconds": round(time.process_time() - begun, 1)}
        write_json(self.output / FIGURES, self.figures)


def _count(paths: Mapping[str, Path]) -> dict[str, Any]:
    return {"rows": {name: sum(1 for _ in read_json_lines(path)) for name, path in paths.items()}}


def _text_model(world: Path, folder: Path, seed: int, steps: int) -> dict[str, Any]:
    texts = [row["text"] for row in read_json_lines(world / "text.jsonl")]
    return {"loss": make_text_model(texts, folder, steps=steps, seed=seed, names=[*NAMES, NEW])}


def configuration_of(run: DemoRun, world: Path) -> dict[str, Any]:
    """What the recipe's file says, with the rows of `world` and what the control changes."""
    text = find("recipes", f"configs/{run.config}.yaml").read_text(encoding="utf-8").replace(DATA, str(world))
    content = yaml.safe_load(text)
    section = content[f"stage_{run.stage}"] if run.stage else content
    tasks = section["tasks"]
    before = sum(task["weight"] for task in tasks.values())
    for name, weight in run.weights.items():
        tasks[name]["weight"] = weight
    if run.shorter:
        section["steps"] = round(section["steps"] * sum(task["weight"] for task in tasks.values()) / before)
    return content


def _train(output: Path, name: str, run: DemoRun, seed: int, steps: int | None) -> dict[str, Any]:
    """A training with the recipe's configuration, whose rows are those of this world."""
    content = configuration_of(run, output / "world")
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    shorter = {} if steps is None else {"steps": steps, "warmup_steps": min(20, steps - 1)}
    options = {"stage": run.stage, "model": str(output / run.start), "output": str(output / name), "seed": seed,
               "overwrite": (output / name / "pretrain.yaml").is_file() or None}  # fmt: skip
    folder = run_pretraining(read_pretrain(path, {**options, **run.options, **shorter}))
    result = json.loads((folder / RESULT).read_text())
    tasks = result["stream"]["tasks"]
    return {
        "steps": result["steps"], "tokens": result["stream"]["tokens"], "padding": result["stream"]["padding"],
        "shares": {task: drawn["share"] for task, drawn in tasks.items()}, "frozen": sorted(result["frozen"]),
        "skipped": {task: drawn["skipped"] for task, drawn in tasks.items() if drawn["skipped"]},
    }  # fmt: skip


class _Judge:
    """Measures the models of OUT, each once, with the same rows."""

    def __init__(self, parts: _Parts, output: Path, tokenizer: SpeechTokenizer) -> None:
        self.parts, self.output, self.tokenizer = parts, output, tokenizer
        self.numbers = read_speech_rows(output / "world/test_numbers.jsonl")
        self.counting = by_document(read_speech_rows(output / "world/test_counting.jsonl"))
        self.voices = VoiceMeasure(output / "world", tokenizer)

    def measure(self, name: str) -> None:
        """Figures of the model in the folder of this name."""
        self.parts.make(f"measured/{name}", lambda: self._figures(name))

    def _figures(self, name: str) -> dict[str, float]:
        measure = Measure(load_family(str(self.output / name), "float32"), self.tokenizer)
        if name.startswith("speaker"):
            return self.voices.figures(measure)
        figures = measure.hears(self.numbers)
        figures["asr_other_wer"] = measure.hears(self.numbers, [*self.numbers[1:], self.numbers[0]])["asr_wer"]
        if name == "base":  # of codes and of going on it knows no more than chance
            return figures
        return {**figures, **measure.speaks(self.numbers), **measure.continues(self.counting)}


def _table(figures: Mapping[str, Any]) -> Table:
    measured = {name.removeprefix("measured/"): row for name, row in figures.items() if name.startswith("measured/")}
    table = Table("figure", *measured, show_edge=False)
    for figure in dict.fromkeys(figure for row in measured.values() for figure in row):
        values = (row.get(figure) for row in measured.values())
        table.add_row(figure, *("" if value is None else f"{value:.3f}" for value in values))
    seconds = sum(row["cpu_seconds"] for name, row in figures.items() if name in ("world", "text_model", "base", *RUNS))
    table.caption = f"CPU seconds of the world and its four trainings: {seconds:.0f}"
    return table
