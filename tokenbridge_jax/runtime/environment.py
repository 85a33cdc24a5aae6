"""Prepares and checks JAX's environment and devices before a command uses them."""

import importlib.util
import os

import jax
from jax._src import xla_bridge  # The installed platforms have no public name.

from tokenbridge_jax.runtime import processes
from tokenbridge_jax.runtime.errors import UserError

# Bytes of the stack of each thread of libtpu.
_LIBTPU_STACK = 4 * 2**20


def enlarge_libtpu_stacks() -> None:
    """Gives the threads of libtpu larger stacks, unless LIBTPU_INIT_ARGS has a size for them.

    The default stacks overflow when some programs are compiled (SIGSEGV; libtpu 0.0.42.1, size L
    for v6e and tpu7x). It counts only before JAX loads libtpu.
    """
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "stack_size" not in given:
        size = f"--fibers_default_thread_stack_size={_LIBTPU_STACK}"
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {size}".strip()


def use_32_bits() -> None:
    """Makes JAX compute in 32 bits even if JAX_ENABLE_X64 is set."""
    jax.config.update("jax_enable_x64", False)


def check_devices() -> None:
    """Makes JAX look for its devices, which it does once per process.

    Raises:
      UserError: JAX_PLATFORMS or JAX_PLATFORM_NAME asks for devices that do not exist.
    """
    try:
        jax.devices()
    except Exception as error:  # The kind depends on the platform and the version of JAX.
        variables = ("JAX_PLATFORM_NAME", "JAX_PLATFORMS")
        asked_by = next((x for x in variables if os.environ.get(x)), "")
        asked = os.environ.get(asked_by, "")
        installed = set(getattr(xla_bridge, "_backend_factories", ()))
        if importlib.util.find_spec("libtpu") is None:
            installed.discard("tpu")  # JAX lists it everywhere.
        # In a job the cause may be another process, unless a platform is not installed here.
        if not asked or not (processes.alone() or set(asked.split(",")) - installed):
            raise
        reason = next(iter(str(error).splitlines()), "").partition(" (")[0].rstrip(". ")
        raise UserError(
            f"{asked_by}={asked} asks for devices that JAX does not find here"
            f"{f' ({reason})' if reason else ''}; it is installed for "
            f"{', '.join(sorted(installed))}: name one of these, or unset the variable to let "
            "JAX choose"
        ) from error
