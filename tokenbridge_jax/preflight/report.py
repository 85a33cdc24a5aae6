"""What `tokenbridge preflight` finds out, as JSON values."""

import dataclasses
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from tokenbridge_jax import parallel
from tokenbridge_jax.data import shards
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.preflight.chips import Slice, peak_flops
from tokenbridge_jax.preflight.programs import (
    Compiled,
    Work,
    compile_work,
    sampling_work,
    training_work,
)
from tokenbridge_jax.preflight.roofline import ASSUMPTIONS, estimate
from tokenbridge_jax.preflight.suggestions import candidates, with_changes
from tokenbridge_jax.preflight.text import gib, listed
from tokenbridge_jax.training.loop import say
from tokenbridge_jax.training.optimizer import OptimizerConfig

# Images of ImageNet's training split (ILSVRC 2012).
IMAGENET_IMAGES = 1_281_167

Report = dict[str, Any]


def check(config: ConfigDict, where: Slice, devices: list[Any], *, sample: bool = False) -> Report:
    """Compiles the program of a config and says what it needs.

    Raises:
      UserError: a value makes no sense, or the compiler refuses for another reason than memory.
    """
    mesh = parallel.make_mesh(**config.mesh, devices=devices)
    work = (sampling_work if sample else training_work)(config, mesh)
    settings: Report = {
        "batch": work.batch,
        "mesh": dict(mesh.shape),
        "remat": config.model.remat,
        "head_chunk": config.model.head_chunk,
    }
    if not sample:
        settings["accumulation"] = config.training.accumulation
    say(f"preflight: compiling for {where.name}: {listed(settings)}")
    try:
        compiled = compile_work(work, len(devices))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu cannot compile it: {str(error).splitlines()[0]}") from error
    report: Report = {
        "what": "sample" if sample else "train",
        "topology": where.name,
        "device": devices[0].device_kind,
        "chips": where.chips,
        "devices": len(devices),
        "settings": settings,
        "program": work.about,
        "compile_seconds": round(compiled.seconds),
        "fits": compiled.fits,
        "memory": {"available": where.figures.memory, "needed": compiled.needed, **work.state},
    }
    if compiled.program is not None:
        report["memory"] |= {"temporaries": compiled.temporaries, "program": compiled.code}
        report |= _time(work, compiled, where, devices)
    return report


def _time(work: Work, compiled: Compiled, where: Slice, devices: list[Any]) -> Report:
    program, peak = compiled.program, peak_flops(devices[0])
    assert program is not None
    spent = estimate(program, compiled.flops, peak, where)
    step = work.mean * spent.step
    return {
        "a_device": {
            "product_flops": compiled.flops,
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
            "instructions": spent.instructions,
            "at_best": work.mean * spent.bound,
            "mean_over_this": work.mean,
            "expected": step,
        },
        "model_flops": work.model_flops,
        "share_of_peak": work.model_flops / (step * peak * len(devices)),
        "images_per_second": work.batch / step,
        "assumptions": ASSUMPTIONS,
    }


def run_length(report: Report, config: ConfigDict, workdir: str | None) -> Report:
    """Steps of the whole run, its days and chip-hours.

    Raises:
      UserError: the config gives no length.
    """
    images, whose = IMAGENET_IMAGES, "ImageNet's, as there are no shards"
    if workdir and (epath.Path(workdir) / "tokens").exists():
        info = shards.read_info(epath.Path(workdir) / "tokens")
        images, whose = info.splits["train"]["images"], f"of {workdir}"
    section = config.training
    per_epoch = images // section.batch_size
    steps = OptimizerConfig.from_section(section, per_epoch, "training").total_steps
    run: Report = {"images": images, "whose_images": whose, "steps": steps}
    if report["fits"]:
        seconds = steps * report["seconds"]["expected"]
        run |= {"days": seconds / 86400, "chip_hours": seconds / 3600 * report["chips"]}
    return {"run": run}


def suggest(config: ConfigDict, where: Slice, devices: list[Any], report: Report) -> Report | None:
    """The report of the first settings that fit, with what was changed; None if there are none."""
    memory = report["memory"]
    excess = memory["needed"] - memory["available"]
    # Gradients are as large as the parameters.
    state = sum(memory[name] for name in ("parameters", "parameters", "EMA", "optimizer"))

    def saved(fsdp: int) -> float:
        return state * (1 - report["settings"]["mesh"]["fsdp"] / fsdp)

    say(f"preflight: {gib(memory['needed'])} of {gib(memory['available'])}: does not fit")
    config = with_changes(config, {f"mesh.{k}": n for k, n in report["settings"]["mesh"].items()})
    for changes in candidates(config, len(devices), excess, saved):
        try:
            found = check(with_changes(config, changes), where, devices)
        except UserError as error:
            say(f"preflight: {error}")
            continue
        if found["fits"]:
            return {"flags": [f"--config.{k}={value}" for k, value in changes.items()]} | found
        say(f"preflight: wants {gib(found['memory']['needed'])}")
    return None
