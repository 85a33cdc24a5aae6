"""CIFAR-10, class-conditional: 32x32 pixels, 8x8 positions of 6 channels, its own autoencoder.

  bash launch/cifar10.sh /data/cifar10

runs every command from the pictures to a page with samples and scores; docs/cifar10.md explains it.
`/data/cifar10` has the class folders `train/CLASS/` and `test/CLASS/`, or with the argument `tfds`
it is TFDS's data directory. Each command alone:

  tokenbridge train-vae --config cifar10 --workdir runs/cifar10 --config.data.path=/data/cifar10
  tokenbridge tokenize --workdir runs/cifar10
  tokenbridge train --workdir runs/cifar10
  tokenbridge sample --workdir runs/cifar10

Arguments: `size=S` is a model of 25 million parameters; `size=B` is the paper's TokenBridge-B, and
trains longer, and has not been run; `quick` takes minutes on two CPU cores, to try the commands.
docs/cifar10.md has the results of `size=S` and what was tried. Keys that are not here have the
values of `configs/base.py`.
"""

from ml_collections import ConfigDict

from tokenbridge_jax.config import experiment, parse_arg
from tokenbridge_jax.model_config import SIZES
from tokenbridge_jax.runtime.errors import UserError

SMALL = dict(
    encoder_width=384, encoder_layers=6, encoder_heads=6,
    decoder_width=384, decoder_layers=6, decoder_heads=6,
    head_width=256, head_layers=3, head_heads=4,
)  # fmt: skip
MODELS = {"S": SMALL, "B": SIZES["B"]}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the file's docstring for the arguments."""
    arguments = parse_arg(arg, size="S", tfds=False, quick=False)
    if arguments.size not in MODELS:
        raise UserError(f"size={arguments.size} is not one of {', '.join(MODELS)}")
    config = experiment("base")
    config.data.update(
        source="tfds" if arguments.tfds else "folder",
        name="cifar10",
        validation_split="test",
        image_size=32,
        num_classes=10,
        flip=True,
    )
    config.autoencoder.update(
        channels=64,
        multipliers=(1, 2, 4),
        attention_resolutions=(),
        latent_channels=6,
    )
    config.vae_training.update(
        batch_size=256,
        steps=5000,
        warmup_steps=200,
        learning_rate=1e-3,
        kl_weight=0.02,
        # Without it, reconstructions are so blurred that a classifier finds fewer classes.
        adversarial_weight=0.5,
        adversarial_start=2500,
        discriminator_layers=2,
        dtype="bfloat16",
    )
    config.quantizer.channel_order = "frequency"
    config.tokenize.update(batch_size=256, posterior_samples=2)
    config.model.update(MODELS[arguments.size])
    config.model.update(buffer=16, dropout=0.0, dtype="bfloat16", head_clip=5.0)
    config.training.update(
        batch_size=256,
        steps=20_000,
        warmup_steps=500,
        learning_rate=1e-3,
        weight_decay=0.02,
        # The paper's 0.7 is for 256 positions. Of 64, late steps of sampling know more than that.
        mask_min=0.3,
        mask_std=0.5,
        ema_decay=0.999,
        eval_every=5000,
        sample_every=10_000,
        checkpoint_every=5000,
    )
    if arguments.size == "B":
        config.model.dropout = 0.1
        config.training.update(steps=40_000, warmup_steps=2000, learning_rate=4e-4)
        config.training.ema_decay = 0.9999
    config.sampling.update(num_iter=64, guidance=10.0, temperature=0.92, batch_size=500)
    config.evaluation.update(reference="data", features="thumbnails")
    if arguments.quick:
        _shrink(config)
    return config


def _shrink(config: ConfigDict) -> None:
    """Minutes on two CPU cores: a narrow autoencoder and model, few steps, little to validate."""
    config.data.validation_split = ""
    config.tokenize.validation_fraction = 0.02
    config.autoencoder.update(channels=16, blocks=1)
    config.vae_training.update(
        batch_size=32, steps=400, warmup_steps=50, learning_rate=2e-3, dtype="float32"
    )
    config.vae_training.update(ema_decay=0.99, log_every=10, checkpoint_every=100)
    config.vae_training.adversarial_weight = 0.0  # So few updates are not enough for it.
    config.tokenize.posterior_samples = 1
    config.model.update(
        encoder_width=128, encoder_layers=2, encoder_heads=4,
        decoder_width=128, decoder_layers=2, decoder_heads=4,
        head_width=64, head_layers=2, head_heads=4,
    )  # fmt: skip
    config.model.update(buffer=8, dropout=0.0, dtype="float32", scan_layers=True)
    config.training.update(
        batch_size=32, steps=300, warmup_steps=30, learning_rate=2e-3, ema_decay=0.98
    )
    config.training.update(head_fraction=0.5, log_every=10)
    config.training.update(eval_every=100, sample_every=300, checkpoint_every=100)
    config.sampling.update(num_iter=16, batch_size=250)
