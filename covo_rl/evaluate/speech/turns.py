"""Whole sets of the benchmarks of turn-taking: shares of successes and of turns taken, mean latencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from covo_rl.evaluate.speech.aggregate import answered_block, known_mean
from covo_rl.evaluate.speech.fields import field
from covo_rl.evaluate.speech.scorers import SCORERS, Row
from covo_rl.evaluate.speech.timing import backchannel_figures, overlap_intervals


def mtr_report(rows: Sequence[Row]) -> dict[str, Any]:
    """MTR-DuplexBench: success in percent, means of latency and frequency over the rows."""
    verdicts = [SCORERS["mtr_duplex"](dict(row))["official"] for row in rows]
    block = answered_block([v["success"] for v in verdicts], scale=100, share=True)
    return {**block, **{name: known_mean(v[name] for v in verdicts) for name in ("latency", "frequency")}}


def take_over_report(rows: Sequence[Row]) -> dict[str, Any]:
    """Full-Duplex-Bench: the share of turns taken, in percent, and the mean latency over those."""
    verdicts = [SCORERS["fdb_timing_derived"](dict(row)) for row in rows]
    block = answered_block([v["took_turn"] for v in verdicts], scale=100, share=True)
    return {**block, "latency": known_mean(v.get("latency") for v in verdicts)}


def overlap_report(rows: Sequence[Row]) -> dict[str, Any]:
    """Full-Duplex-Bench v1.5: mean latencies over all intervals; `score` is the response latency, in seconds."""
    pairs = ((field(row, "user_vad", Sequence), field(row, "model_vad", Sequence)) for row in rows)
    found = [overlap_intervals(*pair) for pair in pairs]
    waits = {name: [end - start for item in found for start, end in item[f"{name}_intervals"]]
             for name in ("response", "stop")}  # fmt: skip
    missing = sum(not item["response_intervals"] for item in found)
    figures = {f"{name}_latency": known_mean(values) for name, values in waits.items()}
    counts = {f"{name}_count": len(values) for name, values in waits.items()}
    return {"score": known_mean(waits["response"]), "n": len(rows), "missing": missing, **figures, **counts}


def backchannel_report(rows: Sequence[Row]) -> dict[str, Any]:
    """Full-Duplex-Bench: `score` is the share of turns taken (lower is better), with frequency and divergence."""
    figures = [
        backchannel_figures(field(row, "segments", Sequence), field(row, "words", Sequence),
                            field(row, "seconds", float), row.get("human"))
        for row in rows
    ]  # fmt: skip
    block = answered_block([float(item["took_turn"]) for item in figures], scale=100, share=True)
    return {**block, **{name: known_mean(item[name] for item in figures) for name in ("frequency", "jsd")}}
