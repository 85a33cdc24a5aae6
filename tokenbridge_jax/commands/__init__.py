"""One file a sub-command: `python -m tokenbridge_jax.commands.NAME` is `tokenbridge NAME`."""

import sys

try:
    import jax as jax
except ValueError as error:  # JAX reads its variables when it is imported, JAX_ENABLE_X64=perhaps.
    reason = " ".join(str(error).split())
    print(f"tokenbridge: error: JAX does not take its environment: {reason}", file=sys.stderr)
    raise SystemExit(2) from error
