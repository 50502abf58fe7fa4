"""GRPO and loaded models from Python, with the options of the command line."""
