"""How a script begins and ends: with a message where the user can put something right, a traceback where we have to.

Neither NumPy nor torch: importing this file is quick.
"""

import ctypes
import os
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h: bytes at the end of the heap, bytes of a block


class UserError(Exception):
    """Something that the user of a script can put right; the message says how."""


class Stopped(Exception):
    """A script that ends before its work is done, as it was asked to; the message says how it goes on."""


def run_script(main: Callable[[], None], interrupted: str) -> None:
    """Run a script; a message in place of the traceback, and status 1, for what is no fault of the program.

    Memory that it frees is kept for its next step, see `keep_freed_memory`.

    Args:
        main: the script.
        interrupted: message after Ctrl-C.
    """
    keep_freed_memory()
    try:
        main()
    except (UserError, ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stop:
        sys.exit(str(stop))
    except KeyboardInterrupt:
        sys.exit(interrupted)


def keep_freed_memory() -> bool:
    """Tell glibc not to give memory back to the system, from which training would get it anew, empty, in every step.

    Returns:
        Whether that was done: it is not where there is another C library, or where the environment says what glibc does
        (`MALLOC_…`, `GLIBC_TUNABLES`).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    settings = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**31 - 1}  # the highest that it takes
    return all(mallopt(name, value) for name, value in settings.items())
