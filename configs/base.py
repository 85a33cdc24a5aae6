"""The base of all experiments: every key of a config, with its default value.

The values are the paper's where experiments share them, otherwise a choice of medium size.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tokenbridge_jax.config import parse_arg, settable
from tokenbridge_jax.model_config import SIZES


def get_config(arg: str | None = None) -> ConfigDict:
    """The config takes no argument. It is locked: an experiment changes values and adds no key."""
    parse_arg(arg)
    config = ConfigDict()
    config.seed = 0
    config.data = dict(
        source="folder",  # class folders of images; or tfds, digits
        path="",
        name="",  # of the TFDS data set
        split="train",
        validation_split="",
        image_size=256,
        image_channels=3,  # or 1, grey
        num_classes=1000,
        flip=False,  # True: also trains on mirrored images
        workers=0,  # processes that decode images; 0: one for each core, fewer for few images
    )
    config.autoencoder = dict(
        channels=128,
        multipliers=(1, 1, 2, 2, 4),  # of `channels`, one for each level
        blocks=2,
        attention_resolutions=(16,),
        latent_channels=16,
        bottleneck="kl",  # or a trained codebook: vq, lfq (bits), fsq
        codes=1024,  # of vq
        levels=8,  # of every channel of fsq
    )
    config.vae_training = _training_section() | dict(
        kl_weight=1e-6,
        commitment_weight=0.25,  # of vq and lfq
        entropy_weight=0.1,  # of lfq
        reconstruction="l1",  # or l2
        perceptual_weight=0.0,  # of LPIPS; LDM: 1.0. Needs `import-metrics --vgg16 --lpips_vgg`
        # Of a discriminator that starts after so many updates; LDM: 0.5 after 50,001, with beta1
        # 0.5, beta2 0.9 and clip 0.
        adversarial_weight=0.0,
        adversarial_start=0,
        discriminator_channels=64,
        discriminator_layers=3,
        discriminator_rate=1.0,  # of learning_rate
        dtype="float32",
    )
    config.quantizer = dict(  # An autoencoder with a codebook has its own levels and range.
        levels=64,
        range=5.0,
        channel_order="identity",  # or kl16, frequency (measured), or numbers: 2,0,1,...
        calibration_images=1000,
    )
    config.tokenize = dict(
        batch_size=32,
        store="indices",  # or latents (posterior mean and deviation, for heads of latents), or both
        # Of indices. 0: the mean, which is all that there is of a codebook.
        posterior_samples=1,
        records_per_shard=4096,
        validation_fraction=0.0,
        # Shards are used for long, so this is precise: on an H200, 5 of 100,000 indices differ from
        # those of a CPU; with tensorfloat32 2 of 100 differ, with bfloat16 17 of 100.
        precision="float32",
    )
    config.model = dict(
        SIZES["L"],  # encoder_width, encoder_layers, encoder_heads, decoder_..., head_...
        head="channel_ar",  # or parallel, masked; of latents: diffusion (MAR), flow, mixture (GIVT)
        channels_per_group=1,
        reveal_steps=4,  # of the head masked, which predicts all channels in so many steps
        reveal_order="fixed",  # of the head masked: the channel order; or confidence
        head_draws=4,  # of the heads diffusion and flow in training
        head_steps=100,  # of the heads diffusion and flow in sampling
        head_clip=0.0,  # of the head diffusion in sampling: bound of predicted latents, 0 is none
        head_solver="heun",  # of the head flow: each step runs its network twice; or euler, once
        head_components=16,  # of the head mixture
        head_proposals=256,  # of the head mixture: draws that guidance chooses from
        channel_order="tokens",  # the shards' own; or reverse, identity
        buffer=64,
        dropout=0.0,
        first_token_quirk=False,
        dtype="float32",
        remat="auto",  # or none, dots, full
        scan_layers=settable("auto"),  # or True, False
        head_chunk=settable("auto"),  # or a number
        float8=False,  # True: products of 8-bit floats, meant for NVIDIA's Hopper and newer
    )
    config.training = _training_section() | dict(
        accumulation=settable("auto"),  # or a number
        decay_head=True,  # False: weight_decay spares the head (MAR)
        class_dropout=0.1,
        mask_mean=1.0,
        mask_std=0.25,
        mask_min=0.7,
        head_fraction=1.0,
        hidden_bucket=16,
        eval_every=1000,  # updates; 0 is never
        sample_every=1000,
    )
    config.sampling = dict(
        num_iter=64,
        guidance=1.0,
        guidance_schedule="linear",  # or constant
        guidance_interval=(0.0, 1.0),
        guidance_every=1,  # 2: the null branch runs in every second step with guidance
        temperature=1.0,
        order="random",  # or raster, halton, confidence
        choice_temperature=1.0,
        batch_size=64,
    )
    # Scores of samples in training, not of `evaluate`. `every` is the number of updates between
    # two; 0 is never. `features` is inception, dinov2 or thumbnails; all but the last need
    # `import-metrics`.
    config.evaluation = dict(every=0, num_images=1000, reference="", features="inception")
    config.mesh = dict(data=-1, fsdp=settable("auto"), tensor=1, slices=-1)
    return config.lock()


def _training_section() -> dict[str, Any]:
    return dict(
        batch_size=64,
        steps=placeholder(int),  # or epochs; steps win
        epochs=placeholder(float),
        learning_rate=1e-3,
        schedule="cosine",  # or constant
        warmup_steps=placeholder(int),  # or warmup_epochs
        warmup_epochs=placeholder(float),
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.0,
        clip=1.0,
        ema_decay=0.999,
        accumulation=1,
        log_every=100,
        checkpoint_every=1000,
        keep=2,
        keep_every=0,
    )
