"""The end of a process that a launcher started, alone or as one of several ranks.

torchrun gives every rank a session of its own, and a launcher that is killed outright cannot tell its ranks: they would
train on, unseen, in the folder that a resumed run then writes to. So a rank asks for SIGTERM when its launcher dies,
and stops as on any other SIGTERM.

gloo's worker threads may still hold tensors of the last collectives when Python tears itself down; taking the
interpreter's lock then aborts the process ("terminate called without an active exception", about 1 in 40 two-rank runs
on a busy machine), and the launcher reports a finished run as failed. So such a process skips the tear-down.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from covo_rl.data.noise import quiet
from covo_rl.data.terminal import LAYOUT, say
from covo_rl.train.ranks import Ranks
from covo_rl.types import visible

#: of torchrun, and of every `accelerate launch`
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def exit_after(main: Callable[[], object]) -> NoReturn:
    """Call `main` and end the process with its exit code; one process ends as Python always does.

    Under a launcher the process gets SIGTERM when that dies (on Linux; elsewhere there is nothing to ask). What
    tracebacks and warnings quote of files and models is shown as text.

    Raises:
        SystemExit: in a single process, 0 or whatever `main` raised.
    """
    if sys.platform == "linux" and any(name in os.environ for name in LAUNCHED):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    sys.excepthook = lambda *error: say("".join(traceback.format_exception(*error)).rstrip("\n"), err=True)
    quiet()
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *words, **options: visible(format_warning(*words, **options), LAYOUT)
    code: object = 0
    try:
        main()
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            error.code = visible(error.code, LAYOUT)
        if Ranks.current().world == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        elif not isinstance(code, int | None):
            if Ranks.current().main or not getattr(error.__context__, "everywhere", False):
                print(code, file=sys.stderr)
            code = 1
    else:
        if Ranks.current().world == 1:
            sys.exit(0)
        import torch.distributed as dist

        dist.barrier()  # nobody hangs up while another rank still reads
        dist.destroy_process_group()
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  # joins threads that are not daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)
