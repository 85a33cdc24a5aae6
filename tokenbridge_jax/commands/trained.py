"""The pipeline of a command that only reads a workdir, with what its flags may change."""

from typing import Any

from absl import flags
from ml_collections import config_flags

from tokenbridge_jax.config import AUTO, make_mesh, sampling_settings
from tokenbridge_jax.model_config import DRAWING_FIELDS, FIXED_FIELDS
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.description import MODEL_FILE, ModelDescription
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say

# Shards may decide the channel order, and imports the quirk, whatever the config says.
_FIXED = {*FIXED_FIELDS} - {"channel_order", "first_token_quirk"}


def load_pipeline(args: flags.FlagValues, ahead: dict[str, Any] | None = None) -> Pipeline:
    """Loads the workdir, with what `--config` and its flags say about drawing (`DRAWING_FIELDS`).

    A line says so if `config.sampling` asks for more steps than there can be.

    `ahead` is that of `Pipeline.load`.

    Raises:
      UserError: a flag changes what training has fixed, or `--config` names an experiment with
        another model, or the workdir cannot be read, or a setting of sampling makes no sense.
    """
    named, model = args["config"].present, args.config.model.to_dict()
    given = {
        name.removeprefix("model."): value
        for name, value in config_flags.get_override_values(args["config"]).items()
        if name.startswith("model.")
    }
    if storage.exists(storage.as_path(args.workdir) / MODEL_FILE):  # `Pipeline.load` says if not.
        _check_fixed(args.workdir, given, model if named else {})
    drawing = {key: model[key] for key in DRAWING_FIELDS if named or key in given}
    num_iter = sampling_settings(args.config.sampling).num_iter
    pipeline = Pipeline.load(
        args.workdir, step=args.step, mesh=make_mesh(args.config), drawing=drawing, ahead=ahead
    )
    if num_iter > (most := pipeline.config.positions):
        say(
            f"sampling.num_iter={num_iter} is more than the {most} positions: "
            f"at most {most} steps are made"
        )
    return pipeline


def _check_fixed(workdir: str, given: dict[str, Any], named: dict[str, Any]) -> None:
    """Raises `UserError` if flags or the model that `--config` names differ from a trained one."""
    trained = ModelDescription.load(workdir).config.to_json()

    def differs(key: str, value: Any) -> bool:
        return value not in (trained.get(key, value), AUTO)

    for key, value in given.items():
        if differs(key, value) and key not in ("channel_order", *DRAWING_FIELDS):
            raise UserError(
                f"--config.model.{key}={value} has no effect on a trained model, which has "
                f"{trained[key]}; leave it out"
            )
    for key, value in named.items():
        if differs(key, value) and key in _FIXED:
            raise UserError(
                f"--config names a model whose {key} is {value}, and that of {workdir} has "
                f"{trained[key]}; name the experiment that it was trained with"
            )
