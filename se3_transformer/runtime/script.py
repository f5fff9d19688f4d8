"""How a script ends: with a message where the user can put something right, with a traceback where we have to.

Neither NumPy nor torch: importing this file is quick.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user of a script can put right; the message says how."""


class Stopped(Exception):
    """A script that ends before its work is done, as it was asked to; the message says how it goes on."""


def run_script(main: Callable[[], None], interrupted: str) -> None:
    """Run a script; a message in place of the traceback, and status 1, for what is no fault of the program.

    Args:
        main: the script.
        interrupted: message after Ctrl-C.
    """
    try:
        main()
    except (UserError, ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stop:
        sys.exit(str(stop))
    except KeyboardInterrupt:
        sys.exit(interrupted)
