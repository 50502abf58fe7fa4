"""Fail unless a short run of the main job learned something and left all files: `python .ci/learned.py RUN`."""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
result = json.loads((run / "result.json").read_text())
steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
first = sum(step["reward_total"] for step in steps[:3]) / 3
last = sum(step["reward_total"] for step in steps[-3:]) / 3
before, after = result["before"], result["after"]
print(f"R_total while training {first:.2f} -> {last:.2f}")
print(f"held-out R_total {before['reward_total']:.2f} -> {after['reward_total']:.2f}")
print(f"held-out sampled accuracy {before['accuracy_sampled']:.3f} -> {after['accuracy_sampled']:.3f}")
assert last > first + 0.2, "the reward did not rise while training"
assert after["reward_total"] > before["reward_total"] + 0.2, "the held-out reward did not rise"
assert after["accuracy_sampled"] > before["accuracy_sampled"], "held-out sampled accuracy did not rise"
for figures in (before, after):
    parts = sum(figures[f"reward_{name}"] for name in ("accuracy", "format", "consistency", "thinking"))
    assert abs(figures["reward_total"] - parts) <= 0.02, "R_total is not the sum of its parts"
    assert abs(figures["accuracy_sampled"] - figures["reward_accuracy"]) <= 1e-9
for control in ("after_silent_audio", "after_swapped_audio"):
    assert 0 <= result[control]["accuracy_sampled"] <= 1
assert [step["step"] for step in steps] == list(range(1, result["steps"] + 1)), "a step is missing in metrics.jsonl"
assert result["train_seconds"] > 0 and result["trainable_parameters"] > 0
adapter = run / result["adapter"]
assert json.loads((adapter / "verification.json").read_text())["ok"] is True, "the export was not verified"
card = (adapter / "README.md").read_text()
assert f"{after['accuracy_greedy']:.4g}" in card, "the model card lacks the figures of the run"
assert (run / "curves.png").stat().st_size > 5_000
rollouts = [json.loads(line) for line in sorted((run / "rollouts").glob("*.jsonl"))[-1].read_text().splitlines()]
assert set(rollouts[0]["rewards"]) == {"accuracy", "format", "consistency", "thinking"}
