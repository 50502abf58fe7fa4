"""Whole weights into a running vLLM, from files that the trainer writes (covo_rl/engines/policy_files.py).

    vllm serve BASE --weight-transfer-config '{"backend": "covo_rl_files"}'

The server's own endpoints: POST /start_weight_update, /update_weights {"update_info": {"source": PATH or address}}
for each file, /finish_weight_update. vLLM brings nccl and CUDA ipc; this one needs no GPU on either side. Then prompt
blocks and encoder outputs must be dropped, which vLLM 0.31 does not do by itself: /reset_prefix_cache,
/reset_encoder_cache.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from covo_rl.serve.fetch import fetched, is_address


@dataclass
class NothingToSay(WeightTransferInitInfo):
    """The two sides need not meet first."""


@dataclass
class WeightSource(WeightTransferUpdateInfo):
    """A safetensors file with published names: a path that this process sees, or the trainer's address of one."""

    source: str


class FilesWeightTransferEngine(WeightTransferEngine[NothingToSay, WeightSource]):
    """Loads each file as vLLM loads a checkpoint, layer by layer."""

    init_info_cls = NothingToSay
    update_info_cls = WeightSource

    def init_transfer_engine(self, init_info: NothingToSay) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own waits for a GPU, which a CPU build lacks; `load_weights` copies before it returns
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: WeightSource) -> None:
        if not is_address(update_info.source):
            return self._load(Path(update_info.source))
        folder_url, _, name = update_info.source.rpartition("/")
        folder = fetched(folder_url, [name])
        try:
            return self._load(folder / name)
        finally:
            shutil.rmtree(folder)

    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (no mapping)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass
