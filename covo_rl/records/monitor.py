"""Advice while a run goes on and afterwards: metrics.jsonl -> what is wrong, what it usually means, what to do.

A pure function of the lines of metrics.jsonl and of the run's options, so nothing of it is stored: the loop, the report
and `covo-rl watch` all compute the same. What is looked for is the table `RULES` in records/rules.py; docs/
troubleshooting.md has a section for each rule. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from covo_rl.records.rules import PAGE, RULES
from covo_rl.records.signs import Past

#: steps without a condition after which it may be said again
QUIET = 20


@dataclass(frozen=True)
class Advice:
    """What the rule of this name saw at this step; `text` may hold names that a user gave: data, not markup."""

    step: int
    rule: str
    text: str
    link: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.rule}: {self.text} See {self.link}"


class Monitor:
    """Reads a run line by line, at the same small cost for each.

    A condition that lasts, or comes and goes, is said once; again only after it was gone for `QUIET` steps.

    Args:
        options: flat, as in config.yaml; what is missing there has its default.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.past = Past(options or {})
        self._words = {name: _word(value) for name, value in self.past.options.items()}
        self._gone: dict[tuple[str, str], int] = {}  # what was said -> steps without it since then

    def see(self, metrics: Mapping[str, Any]) -> list[Advice]:
        """The next line of metrics.jsonl; what there is to say for the first time."""
        if not self.past.add(metrics):
            return []
        news = []
        for rule in RULES:
            said = [key for key in self._gone if key[0] == rule.name]
            for figures in rule.sign(self.past, **rule.numbers):
                key = rule.name, str(figures.get("component", ""))
                if key not in self._gone:
                    text = rule.text.format_map({**self._words, **rule.numbers, **figures})
                    news.append(Advice(self.past.step, rule.name, text, f"{PAGE}#{rule.name}"))
                self._gone[key] = -1
            for key in said:
                self._gone[key] += 1
                if self._gone[key] >= QUIET:
                    del self._gone[key]
        return news


def _word(value: Any) -> Any:
    """An option's value within a sentence."""
    return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else value


def advice(history: Iterable[Mapping[str, Any]], options: Mapping[str, Any] | None = None) -> list[Advice]:
    """All that is to be said about a run, in the order of its steps.

    Args:
        history: the lines of metrics.jsonl. Missing columns, null and NaN are no evidence; a line without a step is
            left out.
        options: as in config.yaml.
    """
    monitor = Monitor(options)
    return [piece for metrics in history for piece in monitor.see(metrics)]
