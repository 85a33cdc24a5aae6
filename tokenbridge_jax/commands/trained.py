"""The pipeline of a command that only reads a workdir, with what its flags may change."""

from typing import Any

from absl import flags
from ml_collections import config_flags

from tokenbridge_jax.config import AUTO, make_mesh
from tokenbridge_jax.model import DRAWING_FIELDS
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.runtime.errors import UserError


def load_pipeline(args: flags.FlagValues) -> Pipeline:
    """Loads the workdir, with the values of `--config.model.KEY` that only concern drawing.

    Raises:
      UserError: a flag changes what training has fixed, or `--config` names an experiment with
        another model, or the workdir cannot be read.
    """
    given = {
        name.removeprefix("model."): value
        for name, value in config_flags.get_override_values(args["config"]).items()
        if name.startswith("model.")
    }
    drawing = {key: value for key, value in given.items() if key in DRAWING_FIELDS}
    pipeline = Pipeline.load(
        args.workdir, step=args.step, mesh=make_mesh(args.config), drawing=drawing
    )
    trained = pipeline.config.to_json()

    def first_change(model: dict[str, Any]) -> str | None:
        for key, value in model.items():
            known = (trained.get(key, value), AUTO)
            if value not in known and key not in ("channel_order", *DRAWING_FIELDS):
                return key
        return None

    if key := first_change(given):
        raise UserError(
            f"--config.model.{key}={given[key]} has no effect on a trained model, which has "
            f"{trained[key]}; leave it out"
        )
    if args["config"].present and (key := first_change(args.config.model.to_dict())):
        raise UserError(
            f"--config names a model whose {key} is {args.config.model[key]}, and that of "
            f"{args.workdir} has {trained[key]}; leave out --config to use the workdir's own"
        )
    return pipeline
