"""A run in which memory runs out once on the last rank; test_memory.py compares it with the undisturbed one.

accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 tests/faults/memory_ranks.py FOLDER
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cases

from covo_rl.policy import Policy
from covo_rl.train.launch import join
from covo_rl.train.shutdown import exit_after

#: old and reference passes, two updates a batch of three and more micro-batches
#: the quantile lies in no tie: first tokens of a prompt's rollouts have the same entropy but for rounding
SETTINGS = {
    "max_steps": 2, "micro_batch_prompts": 1, "num_iterations": 2, "beta": 0.1, "sampler_correction": True,
    "top_entropy_quantile": 0.45, "learning_rate": 1e-3,
}  # fmt: skip


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@contextmanager
def memory_runs_out(where: str, at: int):
    """In the `at`-th pass of the policy that is called for `where`: forward, backward, old_logps, reference."""
    original, count = Policy.forward, 0

    def forward(self, call, *args, **kwargs):
        nonlocal count
        kind = call if call == "old_logps" else "reference" if kwargs.get("reference") else "forward"
        counts = isinstance(call, str) and kind == where.replace("backward", "forward")
        counts &= where != "backward" or torch.is_grad_enabled()
        count += counts
        if not counts or count != at:
            return original(self, call, *args, **kwargs)
        if where != "backward":
            original(self, call, *args, **kwargs)
            full()
        trained = [p for p in self.parameters() if p.requires_grad]
        hook = trained[0].register_hook(lambda grad: (hook.remove(), full()))  # the later layers' gradients are there
        return original(self, call, *args, **kwargs)

    Policy.forward = forward
    try:
        yield lambda: count
    finally:
        Policy.forward = original


def settings(folder: Path, **changes):
    return train_cases.options(folder, **{**SETTINGS, "oom_retry": True, **changes})


def main() -> None:
    torch.set_num_threads(1)
    folder, accelerator = Path(sys.argv[1]), join()
    assert accelerator.num_processes == 2
    train_cases.run(settings(folder / "undisturbed", oom_retry=False), accelerator=accelerator)
    from covo_rl.engines import own

    own.samples_exactly = lambda policy: False  # as in 16 bits, old log-probs take a pass
    for where, at in (("forward", 4), ("backward", 2), ("old_logps", 1), ("reference", 2)):
        if accelerator.process_index == 1:
            with memory_runs_out(where, at) as count:
                train_cases.run(settings(folder / f"{where} {at}"), accelerator=accelerator)
            assert count() > at, (where, count())
        else:
            train_cases.run(settings(folder / f"{where} {at}"), accelerator=accelerator)


if __name__ == "__main__":
    exit_after(main)
