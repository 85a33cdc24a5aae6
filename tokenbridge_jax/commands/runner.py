"""Starts a sub-command: flags, processes, and a user's mistakes as one clear line.

A command module has a docstring (its help), `define_flags(flag_values)` for flags of its own and
`main(args)`, where `args` is an `absl.flags.FlagValues` with at least `config` (an
`ml_collections.ConfigDict`), `workdir` and `distributed`. One with `WORDS` takes one of these words
behind its name, gets it as `main(args, word)`, and needs no workdir; neither does one that says
`NEEDS_WORKDIR = False`. `DEFAULT_CONFIG` names the config file it takes where none is given.
"""

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_dict, config_flags

from tokenbridge_jax import io, processes
from tokenbridge_jax.errors import UserError

# Name -> (module, what it does). Modules are imported only when run: `tokenbridge` alone is quick.
COMMANDS = {
    "train-vae": ("train_vae", "images -> an autoencoder trained on them"),
    "tokenize": ("tokenize", "images + autoencoder -> index shards"),
    "train": ("train", "index shards -> a trained model"),
    "import-torch": ("import_torch", "PyTorch checkpoints -> a workdir"),
    "export-torch": ("export_torch", "a workdir -> PyTorch checkpoints"),
    "sample": ("sample", "trained model + autoencoder -> images"),
    "evaluate": ("evaluate", "trained model, tokens or samples -> scores and where they come from"),
    "edit": ("edit", "pictures + trained model -> pictures with parts drawn anew"),
    "import-metrics": ("import_metrics", "weights of FID's and LPIPS's networks -> this machine"),
    "demo": ("demo", "trained model + autoencoder -> a page in the browser"),
    "benchmark": ("benchmark", "a config -> speed, share of the device's peak, memory"),
    "preflight": ("preflight", "a config -> does it fit a TPU slice, for how long does it train"),
}

# Those that answer SIGTERM by saving.
TRAINING = ("train-vae", "train")

EXIT_USER_ERROR = 2

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


def main() -> int:
    """Entry point of the console script `tokenbridge COMMAND [flags]`."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        wants_help = sys.argv[1:2] in ([], ["-h"], ["--help"], ["--helpfull"], ["help"])
        if not wants_help:
            print(f"tokenbridge: there is no command '{sys.argv[1]}'", file=sys.stderr)
        print(
            "usage: tokenbridge COMMAND --workdir DIR [--config FILE.py[:arg]] [--config.key=value]"
        )
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:14} {summary}")
        print("`tokenbridge COMMAND --help` shows a command's flags.")
        return 0 if wants_help else EXIT_USER_ERROR
    return run(sys.argv[1], sys.argv[2:])


def run(name: str, argv: list[str]) -> int:
    """Runs sub-command `name` with the flags `argv`; returns the process's exit status.

    0: done. 2: a mistake of the user's, told in one line on stderr. 75: training was told to stop
    and has saved its state. 76: another process of the job is gone. 130: interrupted. One of
    several processes does not return but ends.
    """
    command = importlib.import_module(f"tokenbridge_jax.commands.{COMMANDS[name][0]}")
    words = getattr(command, "WORDS", ())
    given = argv[:1] if words and argv and not argv[0].startswith("-") else []
    argv = argv[len(given) :]
    args = flags.FlagValues()
    try:
        with mistakes_in_config():
            _define_flags(args, argv, getattr(command, "DEFAULT_CONFIG", "digits.py"))
        command.define_flags(args)
        if {"-h", "--help", "-help", "--helpfull"} & set(argv):
            print(f"{(command.__doc__ or '').strip()}\n\nflags:\n{args.get_help()}")
            return 0
        if words and (not given or given[0] not in words):
            unknown = f"there is no '{given[0]}'; " if given else ""
            raise UserError(f"{unknown}say what: tokenbridge {name} {'|'.join(words)} [flags]")
        _parse(args, name, argv, needs_workdir=getattr(command, "NEEDS_WORKDIR", not words))
        processes.join(args.distributed, asks_for_signals=name in TRAINING)
        return processes.leave(command.main(args, *given) or 0)
    except UserError as error:
        print(f"tokenbridge {name}: error: {error}", file=sys.stderr)
        return processes.leave(EXIT_USER_ERROR, processes.FAILURE_SECONDS)
    except KeyboardInterrupt:
        print(f"tokenbridge {name}: interrupted", file=sys.stderr)
        return processes.leave(130, processes.FAILURE_SECONDS)
    except Exception:
        if processes.alone():
            raise
        traceback.print_exc()
        # Where a neighbour is gone, a program on the devices may be the first to notice.
        return processes.leave(1, processes.HEARTBEAT_SECONDS + processes.FAILURE_SECONDS)


def remember_config(args: flags.FlagValues) -> None:
    """Makes this command's config the default of later commands in the same workdir."""
    io.write_json(epath.Path(args.workdir) / CONFIG_FILE, args.config.to_dict())


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Keeps other jobs out of a workdir (`io.lock`); process 0 does it for all.

    Raises:
      UserError: another job is using it.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(io.lock(workdir))
            except UserError as error:
                refusal = str(error)
        if refusal := processes.gather(refusal)[0]:
            raise UserError(refusal)
        yield


def default_config_file(name: str = "digits.py") -> Path:
    """A file of `configs`: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent.parent
    in_checkout = package.parent / "configs" / name
    return in_checkout if in_checkout.exists() else package / "configs" / name


def _define_flags(args: flags.FlagValues, argv: list[str], default_config: str) -> None:
    flags.DEFINE_string(
        "workdir", None, "Folder everything is read from and written to.", flag_values=args
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other processes of the job: those of the TPU pod, of Slurm, Open MPI or "
        "Kubernetes, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
        flag_values=args,
    )
    help_text = (
        "Experiment file and its argument, FILE.py[:arg]; single values are set with "
        "--config.section.key=value. Without it: the config this workdir was made with, or "
        f"{default_config}."
    )
    full_argv = ["tokenbridge", *argv]  # What config_flags scans for overrides.
    remembered = _remembered_config(argv)
    if remembered is not None:
        config_flags.DEFINE_config_dict(
            "config", remembered, help_text, flag_values=args, sys_argv=full_argv
        )
    else:
        config_flags.DEFINE_config_file(
            "config",
            str(default_config_file(default_config)),
            help_text,
            flag_values=args,
            sys_argv=full_argv,
        )


def _remembered_config(argv: list[str]) -> ConfigDict | None:
    """The workdir's config, if there is one and no --config FILE takes its place.

    Raises:
      UserError: the workdir is in an object store other than gs://, which is all that Orbax writes
        checkpoints to, or the package for it is not installed.
    """
    given: dict[str, str | None] = {"workdir": None, "config": None}
    for name in given:
        for i, argument in enumerate(argv):
            key, equals, value = argument.lstrip("-").partition("=")
            if argument.startswith("-") and key == name:
                given[name] = value if equals else next(iter(argv[i + 1 : i + 2]), None)
    store, separator, _ = (given["workdir"] or "").partition("://")
    if separator and store != "gs":
        raise UserError(
            f"a --workdir is a folder or in gs://, not in {store}://: mount the bucket as a folder"
        )
    if separator and importlib.util.find_spec("gcsfs") is None:
        raise UserError("a --workdir in gs:// needs gcsfs: pip install 'tokenbridge_jax[gcs]'")
    if given["config"] or not given["workdir"]:
        return None
    path = epath.Path(given["workdir"]) / CONFIG_FILE
    return ConfigDict(_complete(_from_json(io.read_json(path)))) if path.exists() else None


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
def mistakes_in_config() -> Iterator[None]:
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
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error, OSError):
            raise UserError(f"cannot load the config file ({lines[-1]}); check --config") from error
        raise UserError(lines[-1] if lines else repr(error)) from error


def _parse(args: flags.FlagValues, name: str, argv: list[str], *, needs_workdir: bool) -> None:
    with mistakes_in_config():
        rest = args([f"tokenbridge {name}", *argv])
        args.config.lock()  # A config file that cannot be loaded raises here, at first access.
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}'; flags look like --name=value")
    _check_config(args.config)
    if needs_workdir and not args.workdir:
        raise UserError("--workdir is not set; name the folder to work in: --workdir DIR")


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
