"""Makes the report of `tokenbridge preflight`, as JSON values."""

import contextlib
import dataclasses
import multiprocessing
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.config import (
    AUTO,
    auto_choices,
    check_training,
    filled,
    make_mesh,
    mesh_sizes,
    optimizer_config,
    with_changes,
)
from tokenbridge_jax.data import shards
from tokenbridge_jax.preflight.chips import Slice, peak_flops, slice_devices
from tokenbridge_jax.preflight.hlo import Program
from tokenbridge_jax.preflight.lowering import Work, compile_work, sampling_work, training_work
from tokenbridge_jax.preflight.profile import read_profile
from tokenbridge_jax.preflight.profile_report import write_profile
from tokenbridge_jax.preflight.roofline import ASSUMPTIONS, Estimate, estimate
from tokenbridge_jax.preflight.text import Report, listed
from tokenbridge_jax.runtime import children, meshes
from tokenbridge_jax.runtime.compiled import Trial
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import Devices
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.training import auto

# Images of ImageNet's training split (ILSVRC 2012).
IMAGENET_IMAGES = 1_281_167


def check_apart(
    config: ConfigDict, where: Slice, *, sample: bool = False, profile: str | None = None
) -> Report:
    """Runs `check` in another process, because libtpu may crash.

    The schedules that libtpu writes (0.3 GB for size L) are in the system's folder for temporary
    files until it ends.

    After a crash the report has no memory and no time: `fits` is False, `crashed` says what to do.

    Raises:
      UserError: as `check`.
    """
    spawn = multiprocessing.get_context("spawn")  # A fork would not have JAX's threads.
    receiver, sender = spawn.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        arguments = (sender, config, where, Path(folder), sample, profile)
        child = spawn.Process(target=_check_as_child, args=arguments)
        child.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            child.join()
            if not (child.exitcode and child.exitcode < 0):
                raise UserError(
                    f"the process that compiles ended with status {child.exitcode}; its output, "
                    "above, says why"
                ) from None
            if child.exitcode == -signal.SIGKILL:
                raise UserError(
                    "the process that compiles was killed, most likely because memory ran out"
                ) from None
            return _crash(config, where, -child.exitcode, sample=sample)
        finally:
            child.kill()
            child.join()
    if isinstance(found, UserError):
        raise found
    return found


def _check_as_child(
    sender: Connection,
    config: ConfigDict,
    where: Slice,
    folder: Path,
    sample: bool,
    profile: str | None,
) -> None:
    children.begin()
    # libtpu writes schedules only when it compiles.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        devices = slice_devices(where, folder)
        sender.send(check(config, where, devices, folder, sample=sample, profile=profile))
    except UserError as error:
        sender.send(error)


def _crash(config: ConfigDict, where: Slice, number: int, *, sample: bool) -> Report:
    sizes = mesh_sizes(config, where.chips * where.figures.devices)
    mesh = dict(zip(meshes.MESH_AXES, sizes, strict=True))
    report = _begun(config, where, mesh, sample=sample)
    return report | {
        "fits": False,
        "crashed": f"libtpu died of {signal.Signals(number).name} compiling for {where.name}: "
        f"{listed(report['settings'])}; try another model.remat, model.head_chunk or mesh.fsdp, or "
        "another version of libtpu",
    }


def _begun(config: ConfigDict, where: Slice, mesh: dict[str, int], *, sample: bool) -> Report:
    """The part of a report that is known before compiling."""
    settings: Report = {
        "batch": (config.sampling if sample else config.training).batch_size,
        "mesh": mesh,
        "remat": config.model.remat,
        "head_chunk": config.model.head_chunk,
    }
    if not sample:
        settings["accumulation"] = config.training.accumulation
        settings["scan_layers"] = config.model.scan_layers
    return {
        "what": "sample" if sample else "train",
        "topology": where.name,
        "chips": where.chips,
        "devices": where.chips * where.figures.devices,
        "settings": settings,
    }


def check(
    config: ConfigDict,
    where: Slice,
    devices: list[Any],
    folder: Path,
    *,
    sample: bool = False,
    profile: str | None = None,
) -> Report:
    """Compiles the program of a config, and reports its memory and time.

    Args:
      config: the experiment.
      where: the slice.
      devices: `slice_devices(where, folder)`.
      folder: where libtpu writes the schedules.
      sample: whether to compile the sampler, not the training step.
      profile: folder for the profile's tables and picture, if any.

    Raises:
      UserError: a value makes no sense, or the program cannot be compiled for a reason other than
        memory.
    """
    mesh = make_mesh(config, devices)
    work = (sampling_work if sample else training_work)(config, mesh)
    report = _begun(config, where, dict(mesh.shape), sample=sample)
    say(f"preflight: compiling for {where.name}: {listed(report['settings'])}")
    try:
        compiled = compile_work(work, len(devices))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu cannot compile it: {str(error).splitlines()[0]}") from error
    program, needed = compiled.program, compiled.needed
    report |= {
        "device": devices[0].device_kind,
        "program": work.about,
        "compile_seconds": round(compiled.seconds),
        "fits": program is not None,
        "memory": {"available": where.figures.memory, "needed": needed, **work.state},
    }
    if program is not None:
        temporaries = needed - compiled.code - sum(work.state.values())
        report["memory"] |= {"temporaries": temporaries, "program": compiled.code}
        peak = peak_flops(devices[0])
        operations = read_profile(compiled.text, folder, where, where.figures.clock(peak))
        if profile:
            title = f"{report['what']} on {where.name}, {listed(report['settings'])}"
            write_profile(operations, title, epath.Path(profile))
        seconds = sum(operation.seconds for operation in operations)
        spent = estimate(program, compiled.flops, peak, where)
        report |= _time(work, program, spent, seconds, compiled.flops, peak * len(devices))
    return report


def _time(
    work: Work, program: Program, spent: Estimate, seconds: float, flops: int, peak: float
) -> Report:
    step = work.mean * seconds
    return {
        "a_device": {
            "product_flops": flops,
            "memory_traffic": program.traffic,
            "cycles": program.cycles,
            "collectives": [
                dataclasses.asdict(collective) | {"sent": round(collective.sent)}
                for collective in program.collectives
            ],
        },
        "seconds": {
            "products_at_peak": spent.products,
            "memory_traffic": spent.memory,
            "collectives": spent.network,
            "estimated_by_libtpu": spent.instructions + spent.network,
            "program": seconds,
            "at_best": work.mean * spent.bound,
            "mean_over_this": work.mean,
            "expected": step,
        },
        "model_flops": work.model_flops,
        "share_of_peak": work.model_flops / (step * peak),
        "images_per_second": work.batch / step,
        "assumptions": ASSUMPTIONS,
    }


def run_length(report: Report, config: ConfigDict, workdir: str | None) -> Report:
    """Reports the steps, days and chip-hours of the whole run.

    Raises:
      UserError: the config has no length of training.
    """
    images, whose = IMAGENET_IMAGES, "ImageNet's, as there are no shards"
    if workdir and (epath.Path(workdir) / "tokens").exists():
        info = shards.read_info(epath.Path(workdir) / "tokens")
        images, whose = info.splits["train"]["images"], f"of {workdir}"
    per_epoch = images // config.training.batch_size
    steps = optimizer_config(config, "training", per_epoch).total_steps
    run: Report = {"images": images, "whose_images": whose, "steps": steps}
    if report["fits"]:
        seconds = steps * report["seconds"]["expected"]
        run |= {"days": seconds / 86400, "chip_hours": seconds / 3600 * report["chips"]}
    return {"run": run}


def check_auto(config: ConfigDict, where: Slice, profile: str | None = None) -> Report:
    """Reports the training step with what `auto` picks, through `check_apart`.

    If libtpu crashes, or if nothing fits, it is the report of the last settings that were tried.

    Raises:
      UserError: as `check`.
    """
    number = where.chips * where.figures.devices
    devices = Devices(where.generation, "tpu", number, memory=where.figures.memory)
    # As for one device: `check` asks whether there is such a slice, and then divides the batch.
    check_training(config, "training", AbstractMesh((1, 1, 1), meshes.MESH_AXES))
    choices = auto_choices(config, make_model(config), devices)
    if len(choices) == 1:
        return check_apart(filled(config, choices[0].settings), where, profile=profile)
    report: Report = {}

    def attempt(settings: auto.Settings) -> Trial:
        nonlocal report
        report = check_apart(filled(config, settings), where, profile=profile)
        if "crashed" in report:
            raise auto.DoesNotFit(report["crashed"])
        return Trial(report["fits"], report["memory"]["needed"])

    with contextlib.suppress(auto.DoesNotFit):
        auto.pick(choices, devices, attempt)
    return report


def suggest(config: ConfigDict, where: Slice) -> Report | None:
    """Returns the report of what `auto` picks instead of a config's own values, with the flags.

    None if nothing fits, or if the config has no such values.
    """
    freed = with_changes(config, dict.fromkeys(auto.KEYS.values(), AUTO) | {"mesh.data": -1})
    if freed == config or not (found := check_auto(freed, where))["fits"]:
        return None
    settings, mesh = found["settings"], found["settings"]["mesh"]
    values = {key: settings.get(name, mesh.get(name)) for name, key in auto.KEYS.items()}
    return {"flags": [f"--config.{key}={value}" for key, value in values.items()]} | found
