"""A page in the browser: WORKDIR/checkpoints + WORKDIR/autoencoder -> images, edits.

It needs `pip install -e '.[demo]'`. Only this machine can reach it, unless --host says otherwise.
Its settings start with the values of `config.sampling`. Ctrl-C ends it.
"""

import importlib.util
import socket
import sys
import tempfile

from absl import flags

from tokenbridge_jax.commands import runner
from tokenbridge_jax.demo.drawing import Demo
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    flags.DEFINE_integer(
        "step", None, "Step of the checkpoint; the latest by default.", flag_values=flag_values
    )
    flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "Address to listen on; 0.0.0.0 admits everybody who can reach this machine.",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "port",
        7860,
        "Port to listen on; 0 takes any free one.",
        lower_bound=0,
        upper_bound=65535,
        flag_values=flag_values,
    )


def main(args: flags.FlagValues) -> None:
    """Serves the page until it is interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install -e '.[demo]'")
    if args.distributed:
        raise UserError("demo runs in one process; leave out --distributed")
    port = free_port(args.host, args.port)
    pipeline = Pipeline.load(
        args.workdir, step=args.step, mesh=meshes.make_mesh(**args.config.mesh)
    )
    demo = Demo(pipeline, args.config.sampling)
    from tokenbridge_jax.demo import page

    with tempfile.TemporaryDirectory(prefix="tokenbridge-demo-") as folder:
        served = page.launch(demo, args.host, port, folder)
        try:
            print(f"the page is at {served.local_url} (Ctrl-C ends it)", flush=True)
            served.server.thread.join()
        finally:
            demo.close()
            served.close(verbose=False)


def free_port(host: str, port: int) -> int:
    """The port itself, or a free one for 0.

    Raises:
      UserError: it is impossible to listen there.
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
    sys.exit(runner.run("demo", sys.argv[1:]))
