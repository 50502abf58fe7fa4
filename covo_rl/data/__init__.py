"""Question sets in and out, and what is wrong with them: files, folders, the hub, rows in memory; no torch.

    rows of a source -> load_examples -> list[Example] -> row_problems, overlap -> training
                                       list[Example] -> to_rows, write -> another schema

MMAU, MMAR, MMSU, AVQA, AudioMCQ and our own field names are read (`schemas.SCHEMAS`), conversations (`chat.py`), tables
of text (`delimited.py`), and columns under other names; docs/data.md shows each.
"""

from covo_rl.data.check import Overlap, clip_notes, duplicate_rows, overlap, row_problems
from covo_rl.data.convert import to_rows, write
from covo_rl.data.load import load_examples
from covo_rl.data.read import DataError, Problem
from covo_rl.data.schemas import SCHEMAS

__all__ = [
    "SCHEMAS", "DataError", "Overlap", "Problem", "clip_notes", "duplicate_rows", "load_examples", "overlap",
    "row_problems", "to_rows", "write",
]  # fmt: skip
