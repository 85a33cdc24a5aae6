"""ImageNet 256x256, class-conditional: the paper's TokenBridge-B, -L and -H on KL-16 latents.

  tokenbridge tokenize --config imagenet256:size=L --workdir runs/imagenet-l \\
    --config.data.path=/data/imagenet
  tokenbridge train --workdir runs/imagenet-l
  tokenbridge sample --workdir runs/imagenet-l --num_images 64 --classes 207,360,387,974

The recipe is the paper's (v3, appendix): batch 2048, 800 epochs of which 200 warm-up, AdamW with
peak learning rate 4e-4 and cosine decay, bfloat16, EMA 0.9999.

`WORKDIR/autoencoder` must hold an autoencoder: `tokenbridge import-torch` writes KL-16 there, or
`tokenbridge train-vae` with the flags of `tokenize` trains one on your images. An autoencoder that
you trained has its own channel order: use `--config.quantizer.channel_order=frequency`.

Published results of these sizes (FID / IS, 256 steps, linear guidance): L 1.76 / 294.8 at guidance
3.1 and temperature 0.97; H 1.55 / 313.3 at 3.45 and 0.91. Published cost of L: about 6000 A100
hours for 400 epochs. Nothing of this size has been trained with this code yet.

Arguments: `size=B|L|H`; `tfds` reads TFDS `imagenet2012` instead of class folders; `quick` reduces
everything to laptop size, to try a data set or a machine. Other keys, such as those of the
autoencoder, have the values of `configs/base.py`.
"""

from ml_collections import ConfigDict

from tokenbridge_jax.config import experiment, parse_arg
from tokenbridge_jax.model_config import SIZES
from tokenbridge_jax.runtime.errors import UserError

# Guidance and temperature of the published figures; B's were not published.
SAMPLING = {"B": (3.1, 0.97), "L": (3.1, 0.97), "H": (3.45, 0.91)}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the file's docstring for the arguments."""
    arguments = parse_arg(arg, size="L", tfds=False, quick=False)
    if arguments.size not in SIZES:
        raise UserError(f"size={arguments.size} is not one of {', '.join(SIZES)}")
    config = experiment("base")
    config.data.update(
        source="tfds" if arguments.tfds else "folder", name="imagenet2012", flip=True
    )
    config.vae_training.update(
        batch_size=64,
        steps=200_000,
        warmup_steps=1000,
        learning_rate=1e-4,
        dtype="bfloat16",
        checkpoint_every=2000,
    )
    config.quantizer.channel_order = "kl16"
    config.tokenize.validation_fraction = 0.01
    config.model.update(SIZES[arguments.size])
    config.model.update(buffer=64, dropout=0.1, dtype="bfloat16")
    config.training.update(
        batch_size=2048,
        epochs=800.0,
        warmup_epochs=200.0,
        learning_rate=4e-4,
        weight_decay=0.02,
        ema_decay=0.9999,
        eval_every=5000,
        sample_every=10_000,
        checkpoint_every=2500,
        keep=3,
    )
    guidance, temperature = SAMPLING[arguments.size]
    config.sampling.update(num_iter=256, guidance=guidance, temperature=temperature)
    config.evaluation.num_images = 5000
    if arguments.quick:
        _shrink(config)
    return config


def _shrink(config: ConfigDict) -> None:
    """Laptop size: 64x64 pixels, 4x4 positions, a narrow model, 200 steps."""
    config.data.image_size = 64
    config.autoencoder.update(channels=32)
    config.vae_training.update(batch_size=8, steps=100, warmup_steps=10, dtype="float32")
    config.tokenize.update(batch_size=8, records_per_shard=100)
    small = dict(width=64, layers=2, heads=4)
    config.model.update(
        {f"{part}_{key}": small[key] for part in ("encoder", "decoder", "head") for key in small}
    )
    config.model.update(buffer=8, dtype="float32")
    config.training.update(batch_size=32, log_every=10, checkpoint_every=100)
    config.training.update(eval_every=100, sample_every=200)
    config.training.update(steps=200, epochs=None, warmup_steps=20, warmup_epochs=None)
    config.sampling.update(num_iter=8, batch_size=16)
