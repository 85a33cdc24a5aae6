"""What stands behind a command's name: flags, files of flags, and the config they are about.

All of it is read twice. The first time tells which workdir is meant and whether a config file is
named, wherever that is said: then it is known which config the `--config.key=value` change.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

HELP = {"-h", "--help", "-help", "--helpfull"}

# What a config holds; `configs/digits.py` shows all keys.
SECTIONS = (
    "seed",
    "data",
    "autoencoder",
    "vae_training",
    "quantizer",
    "tokenize",
    "model",
    "training",
    "sampling",
    "evaluation",
    "mesh",
)

# What configs had no section for before there was one: nothing is evaluated in training.
EVALUATION = {"every": 0, "num_images": 1000, "reference": "", "features": "inception"}

# The config of the last train-vae, tokenize or train in a workdir.
CONFIG_FILE = "config.json"


def define_path(name: str, help_text: str, flag_values: flags.FlagValues) -> None:
    """Adds a flag that names a file or a folder, where `~` and `~user` are expanded."""
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


class _ConfigFile(ConfigFileFlagParser):
    def parse(self, path: str) -> Any:
        path = _Path(self.name).parse(path)
        try:
            return super().parse(path)
        except UserError as error:  # Raised again by ml_collections, with a traceback as its text.
            raise error.__context__ or error from None


def parse(
    name: str,
    argv: list[str],
    define: Callable[[flags.FlagValues], None],
    *,
    elsewhere: Mapping[str, str],
    default_config: str,
    needs_workdir: bool,
) -> flags.FlagValues:
    """The flags of command `name`, its config among them.

    Args:
      name: of the command.
      argv: what stands behind it.
      define: adds the command's own flags.
      elsewhere: flags of other commands that a user may name here, and whose they are.
      default_config: file of `configs` for a command without --config and remembered config.
      needs_workdir: whether it is a mistake to name none.

    Raises:
      UserError: a flag, a file of flags or the config has a mistake.
    """
    argv = with_flag_files(argv)
    with _mistakes_in_config():
        args = _defined(argv, define, default_config, _remembered_config(argv, define))
        try:
            rest = args([f"tokenbridge {name}", *argv])
        except flags.UnrecognizedFlagError as error:
            flag = error.flagname
            if owner := elsewhere.get(flag) or elsewhere.get(flag.removeprefix("no")):
                raise UserError(f"--{flag} belongs to `{owner}`") from error
            raise
        args.config.lock()  # A config file that cannot be loaded raises here, at first access.
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}'; flags look like --name=value")
    _check_config(args.config)
    if needs_workdir and not args.workdir:
        raise UserError("--workdir is not set; name the folder to work in: --workdir DIR")
    return args


def help_text(define: Callable[[flags.FlagValues], None], default_config: str) -> str:
    """Describes all flags of a command."""
    return _defined([], define, default_config).get_help()


def with_flag_files(argv: list[str]) -> list[str]:
    """The arguments with what stands in --flagfile=FILE in its place, as absl has it.

    absl itself reads the files too late: by then it must be known what the workdir's config is.

    Raises:
      UserError: a file cannot be read.
    """
    try:
        return flags.FlagValues().read_flags_from_files(argv)
    except (flags.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).removeprefix("ERROR:: ").split())
        raise UserError(f"--flagfile cannot be read: {reason}") from error


def config_from(argv: list[str]) -> ConfigDict:
    """The config of `--config=FILE` with the changes behind it.

    Raises:
      UserError: it cannot be loaded, or has no such key.
    """
    with _mistakes_in_config():
        values = _with_config_file(flags.FlagValues(), argv, None, "")
        values(["", *argv])
        values.config.lock()
    return values.config


def default_config_file(name: str = "digits.py") -> Path:
    """A file of `configs`: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent.parent
    in_checkout = package.parent / "configs" / name
    return in_checkout if in_checkout.exists() else package / "configs" / name


def _define_common(args: flags.FlagValues) -> None:
    define_path("workdir", "Folder everything is read from and written to.", args)
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other processes of the job: those of the TPU pod, of Slurm, Open MPI or "
        "Kubernetes, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
        flag_values=args,
    )


def _defined(
    argv: list[str],
    define: Callable[[flags.FlagValues], None],
    default_config: str,
    remembered: ConfigDict | None = None,
) -> flags.FlagValues:
    args = flags.FlagValues()
    _define_common(args)
    text = (
        "Experiment file and its argument, FILE.py[:arg]; single values are set with "
        "--config.section.key=value. Without it: the config this workdir was made with, or "
        f"{default_config}."
    )
    if remembered is None:
        _with_config_file(args, argv, str(default_config_file(default_config)), text)
    else:
        config_flags.DEFINE_config_dict(
            "config", remembered, text, flag_values=args, sys_argv=["tokenbridge", *argv]
        )
    define(args)
    return args


def _with_config_file(
    args: flags.FlagValues, argv: list[str], default: str | None, text: str
) -> flags.FlagValues:
    config_flags.DEFINE_config_file(
        "config", default, text, flag_values=args, sys_argv=["tokenbridge", *argv]
    )
    args["config"].parser = _ConfigFile("config")
    return args


def _remembered_config(
    argv: list[str], define: Callable[[flags.FlagValues], None]
) -> ConfigDict | None:
    """The workdir's config, if there is one and no --config FILE takes its place.

    Raises:
      UserError: the workdir is in an object store other than gs://, which is all that Orbax writes
        checkpoints to, or the package for it is not installed.
    """
    first = flags.FlagValues()
    _define_common(first)
    flags.DEFINE_string("config", None, "", flag_values=first)
    define(first)
    first.set_gnu_getopt()  # The values of --config.key VALUE look like arguments yet.
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
    return (
        ConfigDict(_complete(_from_json(storage.read_json(path)))) if storage.exists(path) else None
    )


def _complete(config: Any) -> Any:
    """A config of an earlier version with the keys that have come since."""
    if not isinstance(config, dict):
        return config
    model = config.get("model", {})
    if "head_chunk" in model and "scan_layers" not in model:
        # `head_chunk` counted slots of an image then.
        model |= {"scan_layers": True, "head_chunk": 4096}
        config["training"].setdefault("head_fraction", 1.0)
        config["sampling"].setdefault("guidance_interval", (0.0, 1.0))
    if "head_width" in model:
        model.setdefault("head", "channel_ar")
        model.setdefault("channels_per_group", 1)
        model.setdefault("channel_order", "tokens")
    if "num_iter" in (sampling := config.get("sampling", {})):
        sampling.setdefault("order", "random")
        sampling.setdefault("choice_temperature", 1.0)
    for section in ("training", "vae_training"):
        if "keep" in (values := config.get(section, {})):
            values.setdefault("keep_every", 0)
    if "dtype" in (tokenize := config.get("tokenize", {})):
        tokenize.setdefault("precision", tokenize.pop("dtype"))
    if "data" in (mesh := config.get("mesh", {})):
        mesh.setdefault("slices", -1)
    if "num_iter" in config.get("sampling", {}):
        evaluation = config.setdefault("evaluation", {})
        for name, value in EVALUATION.items():
            evaluation.setdefault(name, value)
    return config


def _from_json(value: Any) -> Any:
    """JSON knows neither tuples nor the type of what is not set; configs have both."""
    if value is None:
        return config_dict.placeholder(object)
    if isinstance(value, dict):
        return {name: _from_json(item) for name, item in value.items()}
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def _mistakes_in_config() -> Iterator[None]:
    """Tells what a user's config file or flag raises, which can be anything, in one line."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, KeyError) as error:
        # ml_collections passes a KeyError on as an AttributeError around it.
        reason: Any = error
        while isinstance(reason, Exception) and reason.args:
            reason = reason.args[0]
        raise UserError(f"the config has no such key: {' '.join(str(reason).split())}") from error
    except Exception as error:
        if isinstance(error.__context__, UserError):  # A flag's own; absl puts words before it.
            raise error.__context__ from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error, OSError):
            raise UserError(f"cannot load the config file ({lines[-1]}); check --config") from error
        raise UserError(lines[-1] if lines else repr(error)) from error


def _check_config(config: ConfigDict) -> None:
    if "evaluation" not in config:  # A file of a time before there was one.
        with config.unlocked():
            config.evaluation = ConfigDict(EVALUATION)
    missing = [section for section in SECTIONS if section not in config]
    if missing:
        raise UserError(
            f"the config has no {', '.join(missing)}; give a whole one: --config FILE.py "
            f"(a damaged WORKDIR/{CONFIG_FILE} can be removed)"
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed={config.seed} must be from 0 to 2**32 - 1")
