"""How the long scripts of this folder end."""

import sys
from collections.abc import Callable
from pathlib import Path


def run_script(main: Callable[[], int]) -> int:
    """Runs the main function of a script that continues when it is started again.

    Returns:
      The status of the process: that of `main`, or 130 after Ctrl-C, which prints one line.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped; the same command continues", file=sys.stderr)
        return 130
