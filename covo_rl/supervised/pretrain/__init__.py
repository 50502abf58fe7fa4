"""Pre-training: rows of speech, text and dialogues -> documents -> a mixture by tokens -> packed rows -> updates.

    rows.py -> fragments.py -> builder.py, dialogues.py -> tasks.py -> mixture.py -> packing.py -> trainer.py

A `Document` is what one draw of a task becomes; documents are packed, never cut, into rows of one length.
"""
