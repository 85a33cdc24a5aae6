"""Imports the networks that `evaluate` needs. Once per machine; later, PyTorch is not needed.

  tokenbridge import-metrics --inception pt_inception-2015-12-05-6726825d.pth
  tokenbridge import-metrics --dinov2 dinov2_vitl14_pretrain.pth
  tokenbridge import-metrics --vgg16 vgg16-397923af.pth --lpips_vgg vgg.pth

The first file is published at github.com/mseitzer/pytorch-fid (releases, fid_weights), the second
at dl.fbaipublicfiles.com/dinov2/dinov2_vitl14; model.safetensors of
huggingface.co/facebook/dinov2-large has the same weights and is accepted too. The backbones of
LPIPS are at download.pytorch.org/models, LPIPS's own weights in the PyPI package lpips, folder
lpips/weights/v0.1. The SHA-256 of every file is checked. Reading .pth requires
`pip install 'tokenbridge_jax[torch]'`; .safetensors and .npz with the same names do not.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.evaluation import networks
from tokenbridge_jax.runtime.errors import UserError

NEEDS_WORKDIR = False

_FILES = {
    "inception": "FID's Inception.",
    "dinov2": "FD_DINOv2's ViT-L/14.",
    "vgg16": "LPIPS's VGG backbone.",
    "lpips_vgg": "LPIPS's weights for VGG.",
    "alexnet": "LPIPS's AlexNet backbone.",
    "lpips_alex": "LPIPS's weights for AlexNet.",
}


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    for name, help_text in _FILES.items():
        define_path(name, help_text, flag_values)
    define_path(
        "networks",
        f"Folder to write to; by default ${networks.FOLDER_VARIABLE} or the user's cache.",
        flag_values,
    )
    text = "Accept files whose SHA-256 is not the published one, such as converted files."
    flags.DEFINE_bool("unpublished", False, text, flag_values=flag_values)


def main(args: flags.FlagValues) -> None:
    """Imports every network whose files are given."""
    if jax.process_count() > 1:
        raise UserError("import-metrics runs as one process: leave out --distributed")
    given = {name: str(args[name].value) for name in _FILES if args[name].value}
    if not given:
        raise UserError("nothing to import: name --inception, --dinov2, or the two files of LPIPS")
    wanted = [name for name, parts in networks.PARTS.items() if set(parts) & set(given)]
    for name in wanted:
        if not set(networks.PARTS[name]) <= set(given):
            needed = " and ".join(f"--{part} FILE" for part in networks.PARTS[name])
            raise UserError(f"LPIPS needs two files: {needed}")
    folder = Path(args.networks) if args.networks else networks.default_folder()
    if folder is None:
        raise UserError(networks.NO_FOLDER)
    for name in wanted:
        paths = {part: given[part] for part in networks.PARTS[name]}
        path = networks.import_network(name, paths, folder, unpublished=args.unpublished)
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(runner.main(["import-metrics", *sys.argv[1:]]))
