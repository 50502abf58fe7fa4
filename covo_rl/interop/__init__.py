"""Our rows and rewards inside other trainers, for what this one does not do: Megatron, Ray, 30B and more.

    data convert --to verl | swift | nemo-rl    rows.py       the conversation, and in `covo_row` what rewards read
    covo_row, completion -> scores              scoring.py    the same functions, weights and gate as here
    verl.py, swift.py, nemo_rl.py               what each of them loads; nothing else here imports its library

docs/interop.md has the commands, and says what was run.
"""
