"""How the long scripts of this folder end."""

import sys
from collections.abc import Callable
from pathlib import Path

from tokenbridge_jax.commands import runner
from tokenbridge_jax.runtime.errors import UserError


def run_script(main: Callable[[], int]) -> int:
    """Runs the main function of a script that continues when it is started again.

    Returns:
      The status of the process: that of `main`. A `UserError` and Ctrl-C print one line, and
      their statuses are those of the commands.
    """
    name = Path(sys.argv[0]).name
    try:
        return main()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return runner.EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command continues", file=sys.stderr)
        return runner.EXIT_BY_SIGINT
