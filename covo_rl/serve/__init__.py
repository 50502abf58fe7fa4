"""vLLM plug-in: what vLLM lacks of our families, through the entry point `vllm.general_plugins`.

| architecture | |
|---|---|
| CovoAudioForConditionalGeneration | encoder and audio adapter of transformers, Qwen2 decoder of vLLM, LoRA |
| Qwen2AudioWithLoRA | vLLM's own Qwen2-Audio, which takes no adapters, with LoRA on its decoder |

The modules of these import vLLM; vLLM imports them only for a model that names their class. For rollouts there are
`weights.py`, which takes whole weights from files of the trainer (the backend `covo_rl_files`), and `gate.py`, a
middleware that wants the key everywhere and fetches adapters.
"""

from __future__ import annotations

from contextlib import suppress

ARCHITECTURES = {
    "CovoAudioForConditionalGeneration": "covo_rl.serve.covo_audio:CovoAudioOnVllm",
    "Qwen2AudioWithLoRA": "covo_rl.serve.qwen2_audio:Qwen2AudioWithLoRA",
}
WEIGHT_BACKEND = "covo_rl_files"
WEIGHT_ENGINE = ("covo_rl.serve.weights", "FilesWeightTransferEngine")


def register() -> None:
    """Make transformers' Auto classes and vLLM's model registry know our classes; harmless when repeated.

    vLLM calls it in every process that it starts. Raises ImportError where vLLM is not installed.
    """
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory  # pyright: ignore[reportMissingImports]

    from covo_rl.models.covo_audio import register as register_auto_classes

    register_auto_classes()
    known = ModelRegistry.get_supported_archs()
    for name, place in ARCHITECTURES.items():
        if name not in known:
            ModelRegistry.register_model(name, place)
    with suppress(ValueError):  # known already
        WeightTransferEngineFactory.register_engine(WEIGHT_BACKEND, *WEIGHT_ENGINE)
