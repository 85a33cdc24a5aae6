"""What JAX finds in the environment and on the machine, before a command relies on it."""

import importlib.util
import os

import jax
from jax._src import xla_bridge  # What JAX is installed for has no public name.

from tokenbridge_jax.runtime import processes
from tokenbridge_jax.runtime.errors import UserError


def use_32_bits() -> None:
    """Computes as it is meant here, also where JAX_ENABLE_X64 is set for other programs."""
    jax.config.update("jax_enable_x64", False)


def check_devices() -> None:
    """Finds the devices, which JAX does once and for all.

    Raises:
      UserError: JAX_PLATFORMS or JAX_PLATFORM_NAME asks for some that are not there.
    """
    try:
        jax.devices()
    except Exception as error:  # Which, differs by platform and version of JAX.
        variables = ("JAX_PLATFORM_NAME", "JAX_PLATFORMS")
        asked_by = next((x for x in variables if os.environ.get(x)), "")
        asked = os.environ.get(asked_by, "")
        installed = set(getattr(xla_bridge, "_backend_factories", ()))
        if importlib.util.find_spec("libtpu") is None:
            installed.discard("tpu")  # Which JAX lists everywhere.
        # What a job's processes cannot find out about each other's devices may come later.
        if not asked or not (processes.alone() or set(asked.split(",")) - installed):
            raise
        reason = next(iter(str(error).splitlines()), "").partition(" (")[0].rstrip(". ")
        raise UserError(
            f"{asked_by}={asked} asks for devices that JAX does not find here"
            f"{f' ({reason})' if reason else ''}; it is installed for "
            f"{', '.join(sorted(installed))}: name one of these, or unset the variable to take "
            "what there is"
        ) from error
