"""The pipeline of a command that only reads a workdir, with what its flags may change."""

from absl import flags
from ml_collections import config_flags

from tokenbridge_jax.config import AUTO, make_mesh
from tokenbridge_jax.model import DRAWING_FIELDS
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.runtime.errors import UserError


def load_pipeline(args: flags.FlagValues) -> Pipeline:
    """Loads the workdir, with the values of `--config.model.KEY` that only concern drawing.

    Raises:
      UserError: a flag changes what training has fixed, or the workdir cannot be read.
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
    for key, value in given.items():
        if value not in (trained.get(key, value), AUTO) and key != "channel_order":
            raise UserError(
                f"--config.model.{key}={value} has no effect on a trained model, which has "
                f"{trained[key]}; leave it out"
            )
    return pipeline
