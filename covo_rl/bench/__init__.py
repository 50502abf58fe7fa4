"""Benchmarks: our step against the stock one, interleaved in one process.

covo-rl bench grpo --json FILE [--cells P,G,C ...] [--device auto]      (also python -m covo_rl.bench grpo)
"""
