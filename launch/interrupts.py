"""How the long scripts of this folder end when they are told to stop."""

import sys
from collections.abc import Callable
from pathlib import Path


def until_told(main: Callable[[], int]) -> int:
    """Runs a script's main function; Ctrl-C ends it in one line, with the usual status 130."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped; the same command continues", file=sys.stderr)
        return 130
