"""covo_rl: reinforcement learning for large audio language models."""

__version__ = "0.1.0"
