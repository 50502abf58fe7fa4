"""Everything that a resume needs, in folders that are either complete or ignored.

    RUN/checkpoints/step_000012/
      weights.safetensors     trained parameters by name (adapter, or the trained parts with --full)
      optimizer.safetensors   optimiser state by parameter name
                              (FSDP2: of both a file a rank, weights.00000.safetensors, with its own pieces)
      state.json              counters, sampler position, options, hashes of data and reward files, length of the log
      rank_00000.json         random states of this rank; rollouts in use, if saved in the middle of a batch
      rank_00000.safetensors  their tensors
      complete.json           size and sha256 of every file above and of itself, written last

A checkpoint is written under a temporary name, flushed to disk, and renamed. Going back to one moves what is later to
RUN/abandoned. JSON and safetensors only: reading one
cannot run code. `step_000012.003` was saved after three of the next step's optimiser updates.
"""

from covo_rl.train.checkpoint.manifest import CheckpointError
from covo_rl.train.checkpoint.store import CheckpointStore, TrainState

__all__ = ["CheckpointError", "CheckpointStore", "TrainState"]
