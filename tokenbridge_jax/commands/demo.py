"""Serves a page that generates and edits images with WORKDIR/checkpoints and WORKDIR/autoencoder.

It needs `pip install -e '.[demo]'`. Only this machine can reach the page, unless --host is given.
The page starts with the settings of `config.sampling`. Ctrl-C stops the server.
"""

import functools
import importlib.util
import socket
import sys
import tempfile

from absl import flags

from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.trained import load_pipeline
from tokenbridge_jax.demo.drawing import Demo
from tokenbridge_jax.runtime.errors import UserError


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    integer = functools.partial(flags.DEFINE_integer, flag_values=flag_values)
    host = "Address to listen on; 0.0.0.0 admits everybody who can reach this machine."
    integer("step", None, "Step of the checkpoint; the latest by default.")
    flags.DEFINE_string("host", "127.0.0.1", host, flag_values=flag_values)
    integer("port", 7860, "Port to listen on; 0 takes any free one.", 0, 65535)


def main(args: flags.FlagValues) -> None:
    """Serves the page until it is interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install -e '.[demo]'")
    if args.distributed:
        raise UserError("demo runs in one process; leave out --distributed")
    port = free_port(args.host, args.port)
    pipeline = load_pipeline(args)
    demo = Demo(pipeline, args.config.sampling)
    from tokenbridge_jax.demo import page

    # The page's threads may still write while it is removed.
    with tempfile.TemporaryDirectory(
        prefix="tokenbridge-demo-", ignore_cleanup_errors=True
    ) as folder:
        served = page.launch(demo, args.host, port, folder)
        try:
            print(f"the page is at {served.local_url} (Ctrl-C ends it)", flush=True)
            while served.server.thread.is_alive():
                # Not without a limit: another thread may receive the signal that ends this.
                served.server.thread.join(timeout=0.5)
        finally:
            demo.close()
            served.close(verbose=False)


def free_port(host: str, port: int) -> int:
    """Returns the port, or a free one for 0.

    Raises:
      UserError: this process cannot listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((host, port))
            return server.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}); --port=0 takes any free port"
        ) from error


if __name__ == "__main__":
    sys.exit(runner.main(["demo", *sys.argv[1:]]))
