"""MAR (arXiv 2406.11838): the backbone of TokenBridge with a diffusion head, ImageNet at 256x256.

  tokenbridge import-torch --config mar256:size=L --workdir W --checkpoint mar.pth \\
    --autoencoder kl16.ckpt
  tokenbridge sample --workdir W

  tokenbridge tokenize --workdir W
  tokenbridge train --workdir W

The head draws latents, not indices, so `tokenize` stores the mean and deviation of the posterior,
and `train` draws from it anew in each epoch. The values of `training` are MAR's recipe. Published
FID with 256 steps: B 2.31, L 1.78, H 1.55. With 64 steps it is nearly as good.

Arguments: `size=B|L|H`. Other keys have the values of `configs/base.py`.
"""

from ml_collections import ConfigDict

from tokenbridge_jax.config import experiment, parse_arg
from tokenbridge_jax.model_config import SIZES
from tokenbridge_jax.runtime.errors import UserError

# The width and residual blocks of the head, and the guidance that was published with it.
HEADS = {"B": (1024, 6, 2.9), "L": (1280, 8, 3.0), "H": (1536, 12, 3.2)}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the file's docstring for the argument."""
    arguments = parse_arg(arg, size="L")
    if arguments.size not in SIZES:
        raise UserError(f"size={arguments.size} is not one of {', '.join(SIZES)}")
    config = experiment("base")
    width, layers, guidance = HEADS[arguments.size]
    config.data.update(name="imagenet2012", flip=True)
    config.tokenize.store = "latents"
    config.vae_training.update(steps=200_000, warmup_steps=1000, learning_rate=1e-4)
    config.model.update(SIZES[arguments.size])
    config.model.update(head="diffusion", head_width=width, head_layers=layers)
    config.model.update(buffer=64, dropout=0.1, dtype="bfloat16")
    config.training.update(
        batch_size=2048,
        epochs=400.0,
        schedule="constant",
        warmup_epochs=100.0,
        learning_rate=8e-4,
        weight_decay=0.02,
        decay_head=False,
        clip=3.0,
        ema_decay=0.9999,
    )
    config.sampling.update(num_iter=256, guidance=guidance, temperature=1.0)
    return config
