"""vLLM plug-in: what vLLM lacks of our families, through the entry point `vllm.general_plugins`.

| architecture | |
|---|---|
| CovoAudioForConditionalGeneration | encoder and audio adapter of transformers, Qwen2 decoder of vLLM, LoRA |
| Qwen2AudioWithLoRA | vLLM's own Qwen2-Audio, which takes no adapters, with LoRA on its decoder |

The modules beside this one import vLLM; vLLM imports them only for a model that names their class.
"""

from __future__ import annotations

ARCHITECTURES = {
    "CovoAudioForConditionalGeneration": "covo_rl.serve.covo_audio:CovoAudioOnVllm",
    "Qwen2AudioWithLoRA": "covo_rl.serve.qwen2_audio:Qwen2AudioWithLoRA",
}


def register() -> None:
    """Make transformers' Auto classes and vLLM's model registry know our classes; harmless when repeated.

    vLLM calls it in every process that it starts. Raises ImportError where vLLM is not installed.
    """
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    from covo_rl.models.covo_audio import register as register_auto_classes

    register_auto_classes()
    known = ModelRegistry.get_supported_archs()
    for name, place in ARCHITECTURES.items():
        if name not in known:
            ModelRegistry.register_model(name, place)
