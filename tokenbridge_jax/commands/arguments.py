"""Reads a command's arguments: flags, files of flags, and the config that they choose and change.

The arguments are read twice. The first reading finds the workdir and whether a config is named.
This decides which config the `--config.key=value` arguments change.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from tokenbridge_jax.config import (
    add_new_keys,
    check_config,
    experiment_file,
    experiments,
    settable,
)
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.training.auto import KEYS

HELP = {"-h", "--help", "-help", "--helpfull"}

# The file in a workdir with the config of its last train-vae, tokenize or train.
CONFIG_FILE = "config.json"


def define_path(name: str, help_text: str, flag_values: flags.FlagValues) -> None:
    """Adds a flag that names a file or a folder; `~` and `~user` are expanded."""
    serializer: flags.ArgumentSerializer[str] = flags.ArgumentSerializer()
    flags.DEFINE(_Path(name), name, None, help_text, flag_values, serializer)


class _Path(flags.ArgumentParser):
    syntactic_help = "a path"

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> str:
        try:
            return storage.expand(argument)
        except UserError as error:
            raise UserError(f"--{self._name}: {error}") from error


class _Experiment(ConfigFileFlagParser):
    def parse(self, experiment: str) -> Any:
        return super().parse(experiment_file(_Path(self.name).parse(experiment)))


def parse(
    name: str,
    argv: list[str],
    define: Callable[[flags.FlagValues], None],
    *,
    elsewhere: Mapping[str, str],
    default_config: str,
    needs_workdir: bool,
) -> flags.FlagValues:
    """Returns the flags of a command, with its config.

    Args:
      name: the command's name.
      argv: the arguments after the name, from `with_flag_files`.
      define: adds the command's own flags.
      elsewhere: flag -> the command it belongs to, for flags that a user may give here by mistake.
      default_config: the experiment if there is no --config and the workdir has no config.
      needs_workdir: whether --workdir must be given.

    Raises:
      UserError: a flag or the config has a mistake.
    """
    argv = _joined(argv)
    with _mistakes_in_config():
        args = _defined(argv, define, default_config, _remembered_config(argv, define))
        try:
            rest = args([f"tokenbridge {name}", *argv])
        except flags.UnrecognizedFlagError as error:
            flag = error.flagname
            if owner := elsewhere.get(flag) or elsewhere.get(flag.removeprefix("no")):
                raise UserError(f"--{flag} belongs to `{owner}`") from error
            raise
        args.config.lock()  # The first access loads the config file, and raises if it is wrong.
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}'; flags look like --name=value")
    check_config(args.config)
    if needs_workdir and not args.workdir:
        raise UserError("--workdir is not set; name the folder to work in: --workdir DIR")
    return args


def help_text(define: Callable[[flags.FlagValues], None], default_config: str) -> str:
    """Returns the description of all flags of a command."""
    return _defined([], define, default_config).get_help()


def with_flag_files(argv: list[str]) -> list[str]:
    """Replaces every --flagfile=FILE by the flags in it.

    absl itself reads these files too late, after the workdir's config is needed.

    Raises:
      UserError: a file cannot be read.
    """
    try:
        return flags.FlagValues().read_flags_from_files(argv)
    except (flags.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).removeprefix("ERROR:: ").split())
        raise UserError(f"--flagfile cannot be read: {reason}") from error


def config_from(argv: list[str]) -> ConfigDict:
    """Returns the config of `--config=NAME` or FILE, changed by `--config.key=value` arguments.

    Raises:
      UserError: the config cannot be loaded, or has no such key.
    """
    argv = _joined(argv)
    with _mistakes_in_config():
        values = _with_experiment(flags.FlagValues(), argv, None, "")
        values(["", *argv])
        values.config.lock()
    return values.config


def _joined(argv: list[str]) -> list[str]:
    """Joins `--config.key VALUE` to one argument where a value may have any type.

    absl takes such a flag for a boolean one, whose value is never the next argument.
    """
    joined: list[str] = []
    for argument in argv:
        last = joined[-1].lstrip("-").removeprefix("config.") if joined else ""
        if last in KEYS.values() and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _define_common(args: flags.FlagValues) -> None:
    define_path("workdir", "Folder that everything is read from and written to.", args)
    text = (
        "Join the other processes of the job. They are found on a TPU pod, through Slurm, Open MPI "
        "or Kubernetes, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
    )
    flags.DEFINE_bool("distributed", False, text, flag_values=args)


def _defined(
    argv: list[str],
    define: Callable[[flags.FlagValues], None],
    default_config: str,
    remembered: ConfigDict | None = None,
) -> flags.FlagValues:
    args = flags.FlagValues()
    _define_common(args)
    text = (
        f"Experiment and its argument: NAME[:arg] of a built-in one ({', '.join(experiments())}), "
        "or FILE.py[:arg]. --config.section.key=value sets single values. Default: the config that "
        f"this workdir was made with, or {default_config}."
    )
    if remembered is None:
        _with_experiment(args, argv, experiment_file(default_config), text)
        args["config"].default_as_str = f"'{default_config}'"  # Not the path of its file.
    else:
        config_flags.DEFINE_config_dict(
            "config", remembered, text, flag_values=args, sys_argv=["tokenbridge", *argv]
        )
    define(args)
    return args


def _with_experiment(
    args: flags.FlagValues, argv: list[str], default: str | None, text: str
) -> flags.FlagValues:
    config_flags.DEFINE_config_file(
        "config", default, text, flag_values=args, sys_argv=["tokenbridge", *argv]
    )
    args["config"].parser = _Experiment("config")
    return args


def _remembered_config(
    argv: list[str], define: Callable[[flags.FlagValues], None]
) -> ConfigDict | None:
    """Returns the workdir's config, if there is one and no --config replaces it.

    Raises:
      UserError: the workdir is in another object store than gs://, where Orbax cannot write
        checkpoints, or the package for gs:// is not installed.
    """
    first = flags.FlagValues()
    _define_common(first)
    flags.DEFINE_string("config", None, "", flag_values=first)
    define(first)
    first.set_gnu_getopt()  # The VALUE of `--config.key VALUE` looks like an argument here.
    first(["tokenbridge", *argv], known_only=True)
    workdir = first.workdir or ""
    store, separator, _ = workdir.partition("://")
    if separator and store != "gs":
        raise UserError(
            f"a --workdir is a folder or in gs://, not in {store}://: mount the bucket as a folder"
        )
    if separator and importlib.util.find_spec("gcsfs") is None:
        raise UserError("a --workdir in gs:// needs gcsfs: pip install 'tokenbridge_jax[gcs]'")
    if first["config"].present or not workdir:
        return None
    path = storage.as_path(workdir) / CONFIG_FILE
    if not storage.exists(path):
        return None
    values = storage.read_json(path)
    if added := add_new_keys(values):
        say(f"{path} is from an earlier version; it gets {', '.join(added)}")
    values = _from_json(values)
    for name in KEYS.values():
        section, key = name.split(".")
        if key in values.get(section, {}):
            values[section][key] = settable(values[section][key])
    return ConfigDict(values)


def _from_json(value: Any) -> Any:
    """Converts a value from JSON, which has no tuples and no placeholders for missing values."""
    if value is None:
        return config_dict.placeholder(object)
    if isinstance(value, dict):
        return {name: _from_json(item) for name, item in value.items()}
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def _mistakes_in_config() -> Iterator[None]:
    """Turns every error of a user's config file or flags into one line."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        # ml_collections wraps a KeyError in an AttributeError.
        reason: Any = error
        while isinstance(reason, Exception) and reason.args:
            reason = reason.args[0]
        raise UserError(f"the config has no such key: {' '.join(str(reason).split())}") from error
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # absl and ml_collections may have put a traceback around a line.
            if isinstance(cause, UserError) and "\n" not in str(cause):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error, OSError):
            raise UserError(f"cannot load the config file ({lines[-1]}); check --config") from error
        raise UserError(lines[-1] if lines else repr(error)) from error
