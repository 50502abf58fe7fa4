"""Two steps of learning when to speak with `content`, on one rank or under torchrun.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/duplex_ranks_worker.py FOLDER
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_duplex_content import small, trainer_of

from covo_rl.supervised.duplex_stage import new_duplex_family
from covo_rl.train.shutdown import exit_after


def main(folder: Path) -> None:
    """Write the weights, and what was said by stream and stop in the last step, as the main rank has it."""
    family = new_duplex_family(32, 2, seed=0)
    family.model.requires_grad_(False)  # but for the decoder: DDP waits for every gradient
    trainer = trainer_of(small(output=str(folder), prompts_per_step=3, micro_batch_prompts=1), family)
    for _ in range(2):
        _, batch = trainer.train_step()
    if trainer.ranks.main:
        weights = torch.cat([parameter.flatten() for parameter in family.decoder.parameters()]).detach()
        said = {
            f"{question.stream.id} {stop}": reply.text
            for question, scored in zip(batch.questions, batch.rewards, strict=True)
            for stop, reply in scored.replies.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        torch.save((weights, said), folder / "trained.pt")


if __name__ == "__main__":
    exit_after(lambda: main(Path(sys.argv[1])))
