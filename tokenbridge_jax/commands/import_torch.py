"""Imports PyTorch weights: makes a workdir from the releases' checkpoints, to sample or to train.

  tokenbridge import-torch --checkpoint tokenbridge-l.pth --autoencoder kl16.ckpt --workdir W
  tokenbridge import-torch --autoencoder vae/diffusion_pytorch_model.safetensors --workdir W
  tokenbridge import-torch --config mar256:size=L --checkpoint mar-l.pth --autoencoder kl16.ckpt \\
    --workdir W

Files are .pth, .pt, .ckpt or .bin (these need `pip install 'tokenbridge_jax[torch]'`), .safetensors
(or the index of several) or .npz, in any floating-point type. The network is found under any prefix
in its file, such as `first_stage_model.` of Stable Diffusion. If a file holds several copies,
--prefix chooses one.

The shapes of the arrays give the sizes. The config gives what no array shows (by default
configs/imagenet256.py): --config.quantizer.range and .channel_order and, unless the backbone is as
wide as a published one, --config.model.encoder_heads and .decoder_heads together with its widths.

The autoencoder may have the names of LDM (kl16.ckpt) or of AutoencoderKL in diffusers. For the
latter, the config.json beside the file gives the scale of latents; --scale and --shift override it.

The workdir is then complete for `tokenbridge sample`, and for fine-tuning with `tokenize` and
`train`, which starts with the imported weights and a new optimizer. With another
--config.data.num_classes, `train` starts with a new class table.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from tokenbridge_jax.autoencoder import (
    AutoencoderConfig,
    autoencoder_hash,
    load_autoencoder,
    read_description,
    save_autoencoder,
)
from tokenbridge_jax.channels import resolve_channel_order
from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.config import model_config
from tokenbridge_jax.data.tokenizing import make_quantizer
from tokenbridge_jax.model import init_params
from tokenbridge_jax.model_config import HEADS, SIZES, TokenBridgeConfig
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.pipeline.pretrained import WEIGHTS_FILE
from tokenbridge_jax.quantizer import Quantizer, Unquantized
from tokenbridge_jax.runtime import meshes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.torch_bridge import state_dicts
from tokenbridge_jax.torch_bridge.ldm import NETWORK as AUTOENCODER
from tokenbridge_jax.torch_bridge.ldm import import_autoencoder, infer_config, is_diffusers
from tokenbridge_jax.torch_bridge.official import NETWORK as MODEL
from tokenbridge_jax.torch_bridge.official import import_model, infer_sizes, level_values
from tokenbridge_jax.torch_bridge.parts import unwrapped
from tokenbridge_jax.torch_bridge.state_dicts import StateDict
from tokenbridge_jax.training.checkpoints import Checkpoints
from tokenbridge_jax.training.optimizer import OptimizerConfig, make_optimizer
from tokenbridge_jax.training.state import TrainState, abstract_state, state_shardings

DEFAULT_CONFIG = "imagenet256"

# The scale in diffusers if its config has none.
DIFFUSERS_SCALE = 0.18215


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    define_path("checkpoint", "File of the model.", flag_values)
    text = "File of the autoencoder; not needed if WORKDIR/autoencoder exists."
    define_path("autoencoder", text, flag_values)
    text = (
        "Prefix of the tensors to import, if a file holds several copies of the network: model, or "
        "model,model_ema for the parameters and their average."
    )
    flags.DEFINE_list("prefix", None, text, flag_values=flag_values)
    text = "Factor between a posterior sample and a latent."
    flags.DEFINE_float("scale", None, text, flag_values=flag_values)
    text = "Subtracted from a posterior sample before it is scaled."
    flags.DEFINE_float("shift", None, text, flag_values=flag_values)
    text = (
        "Sample like the release's code: add the first timestep embedding to the head's first "
        "token. Turn this off for weights that were trained and evaluated here."
    )
    flags.DEFINE_bool("first_token_quirk", True, text, flag_values=flag_values)


def main(args: flags.FlagValues) -> None:
    """Reads all files, and then writes the workdir if they are right."""
    if jax.process_count() > 1:
        raise UserError("import-torch runs as one process: leave out --distributed")
    with runner.locked(args.workdir):
        config, workdir = args.config, epath.Path(args.workdir)
        folder = workdir / "autoencoder"
        _check(args, workdir)
        parts, state = read_files(args)
        sizes = infer_sizes(parts["model"]) if parts else {}
        if state:
            autoencoder, autoencoder_params = read_autoencoder(args, state, sizes.get("positions"))
        else:
            autoencoder, autoencoder_params = load_autoencoder(folder)
            autoencoder.check_posterior("a released model", "name a new --workdir")
        digest = autoencoder_hash(autoencoder, autoencoder_params)
        if _has_autoencoder(workdir) and read_description(folder)["hash"] != digest:
            raise UserError(
                f"{folder} holds another autoencoder; remove it or name a new --workdir"
            )
        adapt_config(config, autoencoder, sizes, args.first_token_quirk)
        if parts:
            model = make_model(config, autoencoder, sizes, parts["model"])
            with state_dicts.naming(args.checkpoint):
                params = import_model(model, parts)

        if state:
            imported_from = {"imported_from": Path(args.autoencoder).name}
            save_autoencoder(folder, autoencoder, autoencoder_params, imported_from)
        runner.remember_config(args)
        print(
            f"{folder} holds an autoencoder with {autoencoder.latent_channels} channels, "
            f"{autoencoder.downsampling} pixels per position and scale {autoencoder.scale:g}"
        )
        if parts:
            names = tuple(map(str, range(model.classes)))
            ModelDescription(model, names, digest).save(workdir)
            known = {*sizes, "encoder_heads", "decoder_heads"} & set(config.model)
            fields = {f"model.{name}": config.model[name] for name in sorted(known)}
            fields["data.num_classes"] = model.classes
            write_checkpoint(workdir, model, params, fields)
            quirk = "on" if model.first_token_quirk else "off"
            said = f"; first_token_quirk is {quirk}" if HEADS[model.head].has_quirk else ""
            print(f"{workdir} holds the model of {args.checkpoint}, head {model.head}{said}")


def _check(args: flags.FlagValues, workdir: epath.Path) -> None:
    """Checks which files are named, and what the workdir already holds."""
    if not args.checkpoint and not args.autoencoder:
        raise UserError("nothing to import: name --checkpoint FILE, --autoencoder FILE or both")
    trained = Checkpoints(workdir / "checkpoints").latest is not None
    if args.checkpoint and (trained or (workdir / WEIGHTS_FILE).exists()):
        raise UserError(f"{workdir} holds a model already; name a new --workdir")
    if not args.autoencoder and not _has_autoencoder(workdir):
        folder = workdir / "autoencoder"
        raise UserError(f"there is no autoencoder in {folder}; add --autoencoder FILE")


def read_files(args: flags.FlagValues) -> tuple[dict[str, StateDict], StateDict]:
    """Returns the parts of --checkpoint and the state dict of --autoencoder; empty if not given.

    Prints which tensors were imported, if this is not obvious.

    Raises:
      UserError: a file cannot be read, or does not hold exactly one such network; or a --prefix is
        in no file.
    """
    prefixes = set(map(unwrapped, args.prefix or ()))
    found = {
        flag: state_dicts.read_network(args[flag].value, network, prefixes)
        for flag, network in (("checkpoint", MODEL), ("autoencoder", AUTOENCODER))
        if args[flag].value
    }
    for flag, network in found.items():
        for note in network.notes:
            print(f"{args[flag].value}: {note}")
    if missing := prefixes - {place for network in found.values() for place in network.places}:
        raise UserError(f"no file has a network at --prefix={','.join(sorted(missing))}")
    parts = found["checkpoint"].parts if args.checkpoint else {}
    if parts and not infer_sizes(parts["model"]):
        few = ", ".join(list(parts["model"])[:3])
        raise UserError(f"{args.checkpoint} holds no TokenBridge or MAR model, but {few}, ...")
    if not args.autoencoder:
        return parts, {}
    autoencoder = found["autoencoder"]
    if "model_ema" in autoencoder.parts:
        average = autoencoder.places[1]
        print(f"{args.autoencoder}: left out its average; --prefix={average} selects it")
    return parts, autoencoder.parts["model"]


def read_autoencoder(
    args: flags.FlagValues, state: StateDict, positions: int | None
) -> tuple[AutoencoderConfig, dict[str, Any]]:
    """Returns the config and parameters of the autoencoder of --autoencoder.

    Args:
      args: the flags.
      state: its state dict.
      positions: number of positions of the model, if known.

    Raises:
      UserError: the file holds another kind of network, or the scale is unknown.
    """
    with state_dicts.naming(args.autoencoder):
        grid = math.isqrt(positions) if positions else None
        config = infer_config(state, args.config.data.image_size, grid)
        scale, shift = latent_scaling(args, config, is_diffusers(state))
        config = dataclasses.replace(config, scale=scale)
        return config, import_autoencoder(config, state, shift)


def latent_scaling(
    args: flags.FlagValues, config: AutoencoderConfig, diffusers: bool
) -> tuple[float, float]:
    """Returns the scale and shift of latents: from the flags, diffusers' config.json, or KL-16.

    Raises:
      UserError: none of these gives a scale, or config.json describes another kind of autoencoder.
    """
    scale, shift = args.scale, args.shift or 0.0
    path = Path(args.autoencoder).with_name("config.json")
    if diffusers and path.exists():
        described = storage.read_json(path)
        if described.get("norm_num_groups", 32) != 32 or described.get("latents_mean"):
            raise UserError(f"{path} has norm_num_groups or latents_mean unlike KL-16")
        if scale is None:
            scale = described.get("scaling_factor", DIFFUSERS_SCALE)
        if args.shift is None:
            shift = described.get("shift_factor") or 0.0
    if scale is None and not _is_kl16(config):
        raise UserError("it is not KL-16: give the scale of its latents with --scale")
    return AutoencoderConfig.kl16().scale if scale is None else scale, shift


def _is_kl16(config: AutoencoderConfig) -> bool:
    kl16, sizes = AutoencoderConfig.kl16(), ("channels", "multipliers", "blocks", "latent_channels")
    return all(getattr(config, name) == getattr(kl16, name) for name in sizes)


def adapt_config(
    config: ConfigDict, autoencoder: AutoencoderConfig, sizes: Mapping[str, int], quirk: bool
) -> None:
    """Writes the sizes of the arrays into the config that later commands use.

    Raises:
      UserError: the number of heads of the backbone is unknown.
    """
    with config.unlocked():
        config.data.image_channels = autoencoder.image_channels
        for name in config.autoencoder:
            config.autoencoder[name] = getattr(autoencoder, name)
        if not sizes:
            config.data.image_size = autoencoder.image_size
            if config.quantizer.channel_order == "kl16" and not _is_kl16(autoencoder):
                config.quantizer.channel_order = "frequency"
            return
        for part in ("encoder", "decoder"):
            if width := sizes.get(f"{part}_width"):
                config.model[f"{part}_heads"] = _heads(config, part, width)
        before = config.model.head
        config.model.update({name: sizes[name] for name in sizes if name in config.model})
        of_latents = HEADS[config.model.head].of_latents
        if of_latents != HEADS[before].of_latents:
            say(
                f"the file has the head {config.model.head}, but how to train and sample it comes "
                f"from an experiment for {before}; --config mar256 has MAR's settings"
            )
            config.tokenize.store = "latents" if of_latents else "indices"
        config.model.first_token_quirk = quirk and HEADS[config.model.head].has_quirk
        config.quantizer.levels = sizes.get("levels", config.quantizer.levels)
        config.data.num_classes = sizes.get("classes", config.data.num_classes)
        if "positions" in sizes:
            config.data.image_size = math.isqrt(sizes["positions"]) * autoencoder.downsampling


def _heads(config: ConfigDict, part: str, width: int) -> int:
    """Returns the heads of an encoder or decoder of this width, from the config or `SIZES`."""
    heads = f"{part}_heads"
    for known in (config.model, *SIZES.values()):
        if known[f"{part}_width"] == width:
            return known[heads]
    raise UserError(
        f"no array shows how many heads an {part} of width {width} has; add "
        f"--config.model.{part}_width={width} --config.model.{heads}=N"
    )


def make_model(
    config: ConfigDict,
    autoencoder: AutoencoderConfig,
    sizes: Mapping[str, int],
    state: Mapping[str, np.ndarray],
) -> TokenBridgeConfig:
    """Returns the model's config: the adapted config with the level values of the file.

    Raises:
      UserError: the autoencoder has another number of channels, or the channel order is unknown.
    """
    channels = sizes.get("channels", autoencoder.latent_channels)
    if channels != autoencoder.latent_channels:
        raise UserError(
            f"the model has {channels} channels, the autoencoder {autoencoder.latent_channels}; "
            "import the autoencoder that the model was trained with"
        )
    positions = (config.data.image_size // autoencoder.downsampling) ** 2
    if HEADS[config.model.head].of_latents:
        return model_config(config, Unquantized(), tuple(range(channels)), positions)
    quantizer = make_quantizer(config)
    values = level_values(state, np.asarray(quantizer.level_values, np.float32))
    quantizer = Quantizer(tuple(values.tolist()), quantizer.minimum, quantizer.maximum)
    if config.quantizer.channel_order == "frequency":
        raise UserError(
            "no array shows the channel order; copy it from model.json of the model's workdir: "
            "--config.quantizer.channel_order=2,0,1,..."
        )
    order = resolve_channel_order(config.quantizer.channel_order, channels)
    return model_config(config, quantizer, order, positions)


def write_checkpoint(
    workdir: epath.Path,
    model: TokenBridgeConfig,
    params: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> None:
    """Writes checkpoint 0: the imported weights and a new optimizer.

    Args:
      workdir: `checkpoints/0` is written in this folder.
      model: the model's config.
      params: "model", and "model_ema" if the file holds an average.
      fields: settings that must stay the same when training continues from this checkpoint.
    """
    # The layout of the optimizer's state does not depend on its settings.
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=0.0, total_steps=1))
    mesh = meshes.make_mesh(data=1, fsdp=-1, devices=jax.local_devices())
    abstract = abstract_state(functools.partial(init_params, model), optimizer, mesh)
    shardings = state_shardings(abstract)
    raw = jax.device_put(params["model"], shardings.params)
    ema = jax.device_put(params.get("model_ema", params["model"]), shardings.ema_params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(raw)
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        checkpoints.save(TrainState(np.int32(0), raw, ema, opt_state), 0, dict(fields))


def _has_autoencoder(workdir: epath.Path) -> bool:
    return (workdir / "autoencoder" / "config.json").exists()


if __name__ == "__main__":
    sys.exit(runner.main(["import-torch", *sys.argv[1:]]))
