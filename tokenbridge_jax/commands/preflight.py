"""Checks without a TPU whether a config fits a TPU slice, and estimates how long a run takes.

  tokenbridge preflight --config imagenet256:size=L --topology v5e:16x16
  tokenbridge preflight --config imagenet256:size=L --topology v5p-128 --sample --json

Compiles the training step (or the sampler) with libtpu, which takes minutes. Prints the memory that
it needs on a chip, its FLOPs and collectives, and an estimate of its time. For settings of the
config that are `auto`, it picks what `train` would pick on such a slice. If settings that the
config fixes do not fit, it also reports those that `auto` picks.

A topology is GENERATION:SHAPE, where GENERATION is v4, v5e, v5p, v6e or tpu7x, or a name in
Google's cloud, such as v5litepod-256.

Exit status 0: it fits. 3: it does not fit. 4: libtpu crashed; the last line names the settings. 2:
a mistake in the flags or the config.
"""

import json
import sys

import jax
from absl import flags

from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.config import filled
from tokenbridge_jax.preflight.chips import check_libtpu, parse_slice
from tokenbridge_jax.preflight.estimate import check_apart, check_auto, run_length, suggest
from tokenbridge_jax.preflight.text import as_text
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.training.auto import Settings

NEEDS_WORKDIR = False
USES_DEVICES = False

EXIT_DOES_NOT_FIT = 3
EXIT_CRASHED = 4


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""

    def define(kind, name, default, help_text):
        kind(name, default, help=help_text, flag_values=flag_values)

    define(flags.DEFINE_string, "topology", None, "The slice, such as v5e:16x16 or v5p-128.")
    define(flags.DEFINE_bool, "sample", False, "Check the sampler, not the training step.")
    define(flags.DEFINE_bool, "suggest", True, "If the config's values do not fit, find others.")
    define(flags.DEFINE_bool, "json", False, "Print one line of JSON.")
    define_path("profile", "Folder for tables and a picture of the time.", flag_values)


def main(args: flags.FlagValues) -> int:
    """Prints the report of a config on a slice."""
    if not args.topology:
        raise UserError("--topology is not set; name the slice, such as --topology v5e:16x16")
    where = parse_slice(args.topology)
    check_libtpu()
    if args.profile:
        storage.check_folder(args.profile)
    jax.config.update("jax_platforms", "cpu")  # The devices of this machine stay unused.
    config = args.config
    if args.sample:
        # On TPUs `auto` trains deep models with scanned layers, and they sample so.
        config = filled(config, Settings(scan_layers=True))
        if config.sampling.guidance_every > 1:
            raise UserError(
                "--sample cannot estimate sampling.guidance_every="
                f"{config.sampling.guidance_every}: it would count both branches in every step; "
                "leave it out"
            )
        report = check_apart(config, where, sample=True, profile=args.profile)
    else:
        report = check_auto(config, where, args.profile)
        report |= run_length(report, config, args.workdir)
    crashed = report.get("crashed")
    if not (report["fits"] or crashed) and args.suggest and not args.sample:
        found = suggest(config, where)
        report["suggestion"] = found and found | run_length(found, config, args.workdir)
    if args.json or not crashed:
        print(json.dumps(report) if args.json else as_text(report))
    if crashed:
        say(f"tokenbridge preflight: error: {crashed}")
        return EXIT_CRASHED
    return 0 if report["fits"] else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(runner.main(["preflight", *sys.argv[1:]]))
