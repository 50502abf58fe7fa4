"""A decode step as a CUDA graph: the same kernels, started by the device itself instead of one by one by the host.

Not run on a GPU so far. tests/gpu holds a captured step to the plain one, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


class StepGraphs:
    """`advance()` as graphs, one for each number of rows; `advance` reads and writes the same tensors every time.

    A new number of rows makes its first step without a graph, which sets up what the kernels need, and is captured
    after it. A step that cannot be captured is said once and made plainly from then on. None of it off CUDA.
    """

    def __init__(self, advance: Callable[[], None], device: torch.device) -> None:
        self.advance, self.enabled = advance, device.type == "cuda"
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.seen: set[int] = set()
        self.pool = None
        self.replays = 0

    def run(self, rows: int) -> None:
        """One step of `rows` rows."""
        if self.enabled and rows in self.seen and rows not in self.graphs:
            self._capture(rows)
        if graph := self.graphs.get(rows):
            graph.replay()
            self.replays += 1
        else:
            self.advance()
            self.seen.add(rows)

    def _capture(self, rows: int) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads (NCCL's, a judge's) go on calling CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.advance()
        except RuntimeError as error:
            self.enabled = False
            warnings.warn(
                f"a decode step could not be captured as a CUDA graph (torch {torch.__version__}: {error}); sampling "
                "goes on without, slower; Policy(decode_graphs=False) says so from the start",
                stacklevel=2,
            )
            return
        self.graphs[rows] = graph
        self.pool = self.pool or graph.pool()
