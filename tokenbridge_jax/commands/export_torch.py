"""Exports a workdir's weights to PyTorch files, for `import-torch` and for the release's code.

  tokenbridge export-torch --workdir W --out model.pth
  tokenbridge export-torch --workdir W --out model.safetensors --ema --autoencoder kl16.ckpt

A .pth file (it needs `pip install 'tokenbridge_jax[torch]'`) is a dict: `model` is a state dict
with its buffers, and `model_ema` has the averaged parameters. A .safetensors file holds only
`model`. The autoencoder is written in the same way, with the names of LDM.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath

from tokenbridge_jax.autoencoder import load_autoencoder
from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.model_config import DRAWING_FIELDS, HEADS, TokenBridgeConfig
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.pipeline.pretrained import load_weights
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge import state_dicts
from tokenbridge_jax.torch_bridge.ldm import table as autoencoder_table
from tokenbridge_jax.torch_bridge.official import BUFFERS, export_model
from tokenbridge_jax.torch_bridge.table import to_torch


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    define_path("out", "File for the model.", flag_values)
    text = "Write the averaged parameters as `model`, instead of the plain ones."
    flags.DEFINE_bool("ema", False, text, flag_values=flag_values)
    define_path("autoencoder", "File for the autoencoder.", flag_values)


def main(args: flags.FlagValues) -> None:
    """Writes the files."""
    if not args.out and not args.autoencoder:
        raise UserError("nothing to export: name --out FILE, --autoencoder FILE or both")
    if jax.process_count() > 1:
        raise UserError("export-torch runs as one process: leave out --distributed")
    workdir = epath.Path(args.workdir)
    files = [path for path in (args.out, args.autoencoder) if path]
    if len({Path(path).resolve() for path in files}) < len(files):
        raise UserError("--out and --autoencoder name one file; give each its own")
    for path in files:
        state_dicts.check_suffix(path)
        if epath.Path(path).exists():
            raise UserError(f"{path} is there already; name another file, or remove it")
    if args.autoencoder:  # Loaded first: if there is none, nothing is written.
        config, params = load_autoencoder(workdir / "autoencoder")
        config.check_posterior("a PyTorch file", "leave out --autoencoder")
    if args.out:
        _export_model(workdir, args.out, args.ema)
    if args.autoencoder:
        state_dicts.write(args.autoencoder, {"model": to_torch(autoencoder_table(config), params)})
        print(f"wrote {args.autoencoder}; import it with --scale={config.scale!r}")


def _export_model(workdir: epath.Path, out: str, ema: bool) -> None:
    config = ModelDescription.load(workdir).config
    mesh = meshes.make_mesh(data=1, fsdp=-1, devices=jax.local_devices())
    abstract = abstract_params(config, mesh)

    def state_dict(part: str) -> state_dicts.StateDict:
        params, _ = load_weights(workdir, abstract, part=part)
        return export_model(config, jax.tree.map(np.asarray, params))

    averaged = state_dict("ema_params")
    model = averaged if ema else state_dict("params")
    parameters = {name: array for name, array in averaged.items() if name not in BUFFERS}
    state_dicts.write(out, {"model": model, "model_ema": parameters})
    print(f"wrote {out}, the {'averaged' if ema else 'plain'} parameters as `model`")
    if config.first_token_quirk:
        print("model.first_token_quirk is on: the release's code samples as this code does")
    elif HEADS[config.head].has_quirk:
        print(
            "model.first_token_quirk is off: the release's code, which always adds the first "
            "timestep embedding to the head's first token, will sample a little differently"
        )
    if config.of_latents and config.head_clip:
        print(
            f"model.head_clip is {config.head_clip:g}: the release's code, which does not clip "
            "what its steps predict, will sample differently"
        )
    print(f"import it with --checkpoint={out} {' '.join(import_flags(config))}")


def import_flags(config: TokenBridgeConfig) -> list[str]:
    """Returns the flags that give `import-torch` what no array of the file shows."""
    sizes = ("encoder_width", "encoder_heads", "decoder_width", "decoder_heads")
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    changed = [
        name for name in ("dtype", *DRAWING_FIELDS) if getattr(config, name) != defaults[name]
    ]
    flags = [f"--config.model.{name}={getattr(config, name)}" for name in (*sizes, *changed)]
    if isinstance(config.quantizer, Quantizer):
        flags = [
            f"--config.quantizer.range={config.quantizer.maximum:g}",
            f"--config.quantizer.channel_order={','.join(map(str, config.channel_order))}",
            *flags,
        ]
    if HEADS[config.head].has_quirk and not config.first_token_quirk:
        flags.append("--nofirst_token_quirk")
    return flags


if __name__ == "__main__":
    sys.exit(runner.main(["export-torch", *sys.argv[1:]]))
