"""ImageNet 256x256, class-conditional: the paper's TokenBridge-B, -L and -H on KL-16 latents.

  tokenbridge tokenize --config configs/imagenet256.py:size=L --workdir runs/imagenet-l \\
    --config.data.path=/data/imagenet
  tokenbridge train --workdir runs/imagenet-l
  tokenbridge sample --workdir runs/imagenet-l --num_images 64 --classes 207,360,387,974

The recipe is the paper's (v3, appendix): batch 2048, 800 epochs of which 200 warm-up, AdamW with
peak learning rate 4e-4 and cosine decay, bfloat16, EMA 0.9999.

`WORKDIR/autoencoder` must hold an autoencoder: `tokenbridge import-torch` brings KL-16 there. Or
`tokenbridge train-vae` with the same flags as `tokenize` trains one on your images; its channels
have an order of their own, so tokenize with `--config.quantizer.channel_order=frequency`.

Published results of these sizes (FID / IS, 256 steps, linear guidance): L 1.76 / 294.8 at guidance
3.1 and temperature 0.97; H 1.55 / 313.3 at 3.45 and 0.91. Published cost of L: about 6000 A100
hours for 400 epochs. Nothing of this size has been trained with this code yet.

Arguments: `size=B|L|H`; `tfds` reads TFDS `imagenet2012` instead of class folders; `quick` shrinks
everything to laptop size, to try a data set or a machine.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tokenbridge_jax.config import parse_arg
from tokenbridge_jax.model import SIZES
from tokenbridge_jax.runtime.errors import UserError

# Guidance and temperature of the published figures; B's were not published.
SAMPLING = {"B": (3.1, 0.97), "L": (3.1, 0.97), "H": (3.45, 0.91)}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the file's docstring for the arguments."""
    arguments = parse_arg(arg, size="L", tfds=False, quick=False)
    if arguments.size not in SIZES:
        raise UserError(f"size={arguments.size} is not one of {', '.join(SIZES)}")
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict(
        dict(
            source="tfds" if arguments.tfds else "folder",
            path="",
            name="imagenet2012",
            split="train",
            validation_split="",
            image_size=256,
            image_channels=3,
            num_classes=1000,
            flip=True,
        )
    )
    config.autoencoder = ConfigDict(
        dict(
            channels=128,
            multipliers=(1, 1, 2, 2, 4),
            blocks=2,
            attention_resolutions=(16,),
            latent_channels=16,
        )
    )
    config.vae_training = ConfigDict(
        dict(
            batch_size=64,
            steps=200_000,
            epochs=placeholder(float),
            learning_rate=1e-4,
            schedule="cosine",
            warmup_steps=1000,
            warmup_epochs=placeholder(float),
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            clip=1.0,
            kl_weight=1e-6,  # as KL-16
            reconstruction="l1",
            ema_decay=0.999,
            accumulation=1,
            dtype="bfloat16",
            log_every=100,
            checkpoint_every=2000,
            keep=2,
            keep_every=0,
        )
    )
    config.quantizer = ConfigDict(
        dict(levels=64, range=5.0, channel_order="kl16", calibration_images=1000)
    )
    config.tokenize = ConfigDict(
        dict(
            batch_size=32,
            posterior_samples=1,
            records_per_shard=4096,
            validation_fraction=0.01,
            decode_workers=0,
            # Shards are for good. Of the indices, 5 in 100,000 are others than on a CPU (on an
            # H200); with tensorfloat32 2 in 100, with bfloat16 17.
            precision="float32",
        )
    )
    config.model = ConfigDict(
        SIZES[arguments.size]
        | dict(
            head="channel_ar",  # or parallel
            channels_per_group=1,
            channel_order="tokens",  # the shards' own; or reverse, identity
            buffer=64,
            dropout=0.1,
            class_dropout=0.1,
            mask_mean=1.0,
            mask_std=0.25,
            mask_min=0.7,
            dtype="bfloat16",
            remat="none",
            scan_layers=False,
            head_chunk=4096,
        )
    )
    config.training = ConfigDict(
        dict(
            batch_size=2048,
            steps=placeholder(int),
            epochs=800.0,
            learning_rate=4e-4,
            schedule="cosine",
            warmup_steps=placeholder(int),
            warmup_epochs=200.0,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.02,
            clip=1.0,
            ema_decay=0.9999,
            accumulation=1,
            head_fraction=1.0,
            hidden_bucket=16,
            log_every=100,
            eval_every=5000,
            sample_every=10_000,
            checkpoint_every=2500,
            keep=3,
            keep_every=0,
        )
    )
    guidance, temperature = SAMPLING[arguments.size]
    config.sampling = ConfigDict(
        dict(
            num_iter=256,
            guidance=guidance,
            guidance_schedule="linear",
            guidance_interval=(0.0, 1.0),
            temperature=temperature,
            order="random",
            choice_temperature=1.0,
            batch_size=64,
        )
    )
    config.evaluation = ConfigDict(
        dict(every=0, num_images=5000, reference="", features="inception")
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, slices=-1))

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
