"""Runs a sub-command: reads its flags, starts its processes, and reports errors in one line.

A command module has a docstring (its help), `define_flags(flag_values)` for its own flags and
`main(args)`, where `args` is an `absl.flags.FlagValues` with at least `config` (an
`ml_collections.ConfigDict`), `workdir` and `distributed`. It may also define

  WORDS           one of these words must follow the command's name. The command then defines
                  `define_flags(flag_values, word)`, where None selects the flags of all words, and
                  `main(args, word)`. It needs no workdir.
  NEEDS_WORKDIR   False if the command needs no workdir
  USES_DEVICES    False if the command does not use this machine's devices
  DEFAULT_CONFIG  the default experiment, if it is not digits
"""

import contextlib
import functools
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from etils import epath

from tokenbridge_jax.commands import arguments, failures
from tokenbridge_jax.runtime import compilation_cache, environment, locks, processes, storage
from tokenbridge_jax.runtime.errors import UserError

# Name -> (module, what it does). A module is imported when its command runs, which keeps
# `tokenbridge` alone quick.
COMMANDS = {
    "train-vae": ("train_vae", "trains an autoencoder on images"),
    "tokenize": ("tokenize", "turns images into token shards with an autoencoder"),
    "train": ("train", "trains a model on token shards"),
    "import-torch": ("import_torch", "makes a workdir from PyTorch checkpoints"),
    "export-torch": ("export_torch", "writes a workdir's weights to PyTorch files"),
    "sample": ("sample", "generates images with a trained model"),
    "evaluate": (
        "evaluate",
        "scores a trained model, tokens or samples, and records what the scores depend on",
    ),
    "edit": ("edit", "draws parts of pictures again with a trained model"),
    "import-metrics": ("import_metrics", "installs the weights that FID, FD_DINOv2, LPIPS need"),
    "demo": ("demo", "shows a trained model on a page in the browser"),
    "benchmark": (
        "benchmark",
        "measures the speed and memory of a config, and its share of the peak",
    ),
    "preflight": ("preflight", "predicts whether a config fits a TPU slice, and its training time"),
}

# Commands that save their state on SIGTERM.
TRAINING = ("train-vae", "train")

EXIT_USER_ERROR = 2
EXIT_BY_SIGINT, EXIT_BY_SIGTERM = 130, 143  # As shells say it: 128 and the signal's number.
# Of a command that was told to stop. The first is `training.loop.EXIT_INTERRUPTED`.
STOPPED = os.EX_TEMPFAIL, EXIT_BY_SIGINT, EXIT_BY_SIGTERM


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script `tokenbridge COMMAND [flags]`, and of command modules.

    `argv` is the command and its flags; by default those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        wants_help = set(argv[:1]) <= {*arguments.HELP, "help"}
        if not wants_help:
            print(f"tokenbridge: there is no command '{argv[0]}'", file=sys.stderr)
        print("usage: tokenbridge COMMAND --workdir DIR [--config NAME[:arg]] [--config.key=value]")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:14} {summary}")
        print("`tokenbridge COMMAND --help` shows a command's flags.")
        print(
            "Compiled programs are kept for the next start, in ~/.cache/tokenbridge_jax/programs;"
        )
        print("JAX_ENABLE_COMPILATION_CACHE=false switches this off.")
        return 0 if wants_help else EXIT_USER_ERROR
    return ended(run(argv[0], argv[1:]))


def ended(status: int) -> int:
    """The status of a command, for `sys.exit`. Without success the process ends here.

    XLA may be compiling in threads of its own. Python would wait for some of them, and crash with
    others. A command that has returned has closed its files.
    """
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def run(name: str, argv: list[str]) -> int:
    """Runs sub-command `name` with the flags `argv`; returns the process's exit status.

    0: success. 1: a bug or a temporary fault; the traceback is in a file. 2: a user's mistake, with
    one line on stderr. 75: training was asked to stop and has saved its state. 76: another process
    of the job has ended. 130: interrupted. 143: terminated. One of several processes exits instead
    of returning.
    """
    try:
        command = importlib.import_module(f"tokenbridge_jax.commands.{COMMANDS[name][0]}")
        words = getattr(command, "WORDS", ())
        config = getattr(command, "DEFAULT_CONFIG", "digits")
        argv = arguments.with_flag_files(argv)
        given = argv[:1] if words and argv and not argv[0].startswith("-") else []
        argv = argv[len(given) :]
        define, elsewhere = _flags_of(name, command, given[0] if given else None)
        if arguments.HELP & set(argv):
            flags_help = arguments.help_text(define, config)
            print(f"{(command.__doc__ or '').strip()}\n\nflags:\n{flags_help}")
            return 0
        if words and (not given or given[0] not in words):
            unknown = f"there is no '{given[0]}'; " if given else ""
            # `evaluate` used to take its word as --what.
            old = re.search(r"(?:^| )--?what[= ](\w+)", " ".join(argv))
            if old and old[1] in words:
                raise UserError(f"--what is now a word: tokenbridge {name} {old[1]} [flags]")
            raise UserError(f"{unknown}name one: tokenbridge {name} {'|'.join(words)} [flags]")
        args = arguments.parse(
            name,
            argv,
            define,
            elsewhere=elsewhere,
            default_config=config,
            needs_workdir=getattr(command, "NEEDS_WORKDIR", not words),
        )
        environment.use_32_bits()
        environment.enlarge_libtpu_stacks()
        processes.join(args.distributed, asks_for_signals=name in TRAINING)
        if getattr(command, "USES_DEVICES", True):
            environment.check_devices()
            if jax.process_count() == 1:
                compilation_cache.enable()
        with _ended_by_sigterm():  # After libtpu's handler, which prints its stack.
            status = command.main(args, *given)
        return processes.leave(status or 0)
    except UserError as error:
        print(f"tokenbridge {name}: error: {error}", file=sys.stderr)
        return processes.leave(EXIT_USER_ERROR, processes.FAILURE_SECONDS)
    except KeyboardInterrupt as interrupt:
        word, status = "terminated", EXIT_BY_SIGTERM
        if not interrupt.args:
            word, status = "interrupted", EXIT_BY_SIGINT
        print(f"tokenbridge {name}: {word}", file=sys.stderr)
        return processes.leave(status, processes.FAILURE_SECONDS)
    except Exception as error:
        reason, status = failures.describe(error)
        print(f"tokenbridge {name}: error: {reason}{failures.keep(name, error)}", file=sys.stderr)
        if processes.alone():
            return status
        traceback.print_exc()  # The file may be lost together with its host.
        # When another process ends, a program on the devices can fail before the heartbeat does.
        return processes.leave(status, processes.heartbeat_seconds() + processes.FAILURE_SECONDS)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what runs inside as Ctrl-C does, with nothing left behind; a second one kills.

    Not with several processes: they wait for each other in C, where no handler of Python runs.
    """

    def terminate(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    if not processes.alone() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _flags_of(
    name: str, command: Any, word: str | None
) -> tuple[Callable[[flags.FlagValues], None], dict[str, str]]:
    """Returns what defines the flags of a word, and the words that each flag belongs to."""
    words = getattr(command, "WORDS", ())
    if not words:
        return command.define_flags, {}
    owners: dict[str, list[str]] = {}
    for other in words:
        values = flags.FlagValues()
        command.define_flags(values, other)
        for flag in values:
            owners.setdefault(flag, []).append(other)
    known = word if word in words else None
    elsewhere = {flag: f"tokenbridge {name} {'|'.join(has)}" for flag, has in owners.items()}
    return functools.partial(command.define_flags, word=known), elsewhere


def remember_config(args: flags.FlagValues) -> None:
    """Makes this command's config the default of later commands in the same workdir."""
    storage.write_json(epath.Path(args.workdir) / arguments.CONFIG_FILE, args.config.to_dict())


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Locks a workdir against other jobs (`locks.lock`); process 0 holds the lock.

    Raises:
      UserError: another job is using the workdir.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(locks.lock(workdir))
            except UserError as error:
                refusal = str(error)
        if refusal := processes.gather(refusal)[0]:
            raise UserError(refusal)
        yield
