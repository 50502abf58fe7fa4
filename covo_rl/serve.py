"""vLLM plug-in: makes `covo_audio` known to a vLLM process, through the entry point `vllm.general_plugins`.

vLLM has no Covo-Audio of its own; it runs the transformers class through its transformers backend, for which the
Auto classes must know the model type in every worker process.
"""

from __future__ import annotations


def register() -> None:
    """Register configuration, model and processor with transformers' Auto classes; harmless when repeated."""
    from covo_rl.models.covo_audio import register as register_auto_classes

    register_auto_classes()
