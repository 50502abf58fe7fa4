"""How well the answers can be heard at all: a plain log-mel CNN for each kind of question, without any text.

    python recipes/real_recordings/baseline.py --data data/real --output cnn.json      # ten minutes on one CPU thread

The network names the fact that the question asks for; of the row's options the likeliest is its answer. It sees the
same clips as the language model and learns from the train split alone, so the distance to it is what the language
model fails to hear, and its own distance to 100 what these recordings do not teach about unseen speakers and kits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from covo_rl.data.files import write_json
from covo_rl.data.terminal import say

BINS, WINDOW, HOP = 48, 256, 160  # at 8 kHz: 32 ms, fifty frames a second
TASKS = ("voice", "number", "words", "hits", "drum", "kind", "order")


def log_mel(wave: Tensor, rate: int) -> Tensor:
    """(samples,) -> (BINS, frames), mean 0 and deviation 1 over the clip."""
    spectrum = torch.stft(wave, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs() ** 2
    bank = mel_filter_bank(WINDOW // 2 + 1, BINS, 60.0, rate / 2, rate, mel_scale="slaney", norm="slaney")
    mel = torch.log(torch.as_tensor(bank, dtype=torch.float32).T @ spectrum + 1e-7)
    return (mel - mel.mean()) / mel.std()


class Network(nn.Module):
    """Five convolutions of 3 x 3, a mean and a maximum over time, a line."""

    def __init__(self, classes: int, widths: Sequence[int] = (16, 32, 48, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(*layers)
        self.line = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * widths[-1], classes))

    def forward(self, mels_NBF: Tensor) -> Tensor:
        hidden = self.layers(mels_NBF[:, None]).mean(2)
        return self.line(torch.cat([hidden.mean(2), hidden.amax(2)], 1))


def masked(mels_NBF: Tensor, generator: torch.Generator) -> Tensor:
    """A batch rolled in time by up to a tenth, with a band of up to 8 bins and up to 15 frames set to the mean."""

    def number(top: int) -> int:
        return int(torch.randint(top, (1,), generator=generator))

    result = mels_NBF.clone()
    for mel in result:
        mel.copy_(mel.roll(number(30) - 15, 1))
        low, early = number(BINS - 8), number(mel.shape[1] - 15)
        mel[low : low + number(9)] = 0
        mel[:, early : early + number(16)] = 0
    return result


def learn(
    mels_NBF: Tensor, labels: Tensor, classes: int, steps: int, generator: torch.Generator, *, batch: int = 32
) -> Network:
    """A network trained for `steps` steps of AdamW under one cycle of the learning rate."""
    network = Network(classes).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        logits = network(masked(mels_NBF[chosen], generator))
        loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: Network, rows: Sequence[dict[str, Any]], mels_NBF: Tensor, names: Sequence[str]) -> float:
    """Share of rows whose answer is the likeliest of the row's options."""
    logits = torch.cat([network(part) for part in mels_NBF.split(64)])
    right = 0
    for row, scores in zip(rows, logits, strict=True):
        right += max(row["choices"], key=lambda choice: float(scores[names.index(choice)])) == row["answer"]
    return right / len(rows)


def load(folder: Path, split: str, task: str) -> tuple[list[dict[str, Any]], Tensor]:
    rows = [row for row in json.loads((folder / f"{split}.json").read_text()) if row["sub-category"] == task]
    waves = [soundfile.read(folder / row["audio_id"], dtype="float32") for row in rows]
    return rows, torch.stack([log_mel(torch.from_numpy(wave), rate) for wave, rate in waves])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/real", help="folder that build.py wrote")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--steps", type=int, default=300, help="for each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file of the figures")
    options = parser.parse_args()
    folder, figures = Path(options.data), {}
    for task in options.tasks:
        begun = time.perf_counter()
        torch.manual_seed(options.seed)
        generator = torch.Generator().manual_seed(options.seed)
        rows, mels_NBF = load(folder, "train", task)
        names = sorted({row["answer"] for row in rows})
        labels = torch.tensor([names.index(row["answer"]) for row in rows])
        network = learn(mels_NBF, labels, len(names), options.steps, generator)
        figures[task] = {"train": round(accuracy(network, rows, mels_NBF, names), 4)}
        for split in ("validation", "test"):
            held_out, held_out_NBF = load(folder, split, task)
            figures[task][split] = round(accuracy(network, held_out, held_out_NBF, names), 4)
            figures[task][f"{split}_rows"] = len(held_out)
        figures[task]["seconds"] = round(time.perf_counter() - begun)
        say(f"{task}: {figures[task]}")
        if options.output:  # as far as it is
            write_json(Path(options.output), {"steps": options.steps, "seed": options.seed, "tasks": figures})
    mean = {split: round(float(np.mean([figure[split] for figure in figures.values()])), 4)
            for split in ("train", "validation", "test")}  # fmt: skip
    say(f"mean of {len(figures)} tasks: {mean}")
    if options.output:
        write_json(Path(options.output), {"steps": options.steps, "seed": options.seed, "tasks": figures, "mean": mean})


if __name__ == "__main__":
    main()
