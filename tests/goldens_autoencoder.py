"""Checks one `kl_vae_*.npz` golden against the autoencoder."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tokenbridge_jax.autoencoder import Autoencoder, AutoencoderConfig, Posterior, abstract_params
from tokenbridge_jax.torch_bridge.ldm import table
from tokenbridge_jax.torch_bridge.table import from_torch, to_torch


def read_autoencoder_golden(
    path: Path,
) -> tuple[AutoencoderConfig, dict[str, Any], dict[str, np.ndarray]]:
    """Returns the config, the parameters and all arrays of a file."""
    with np.load(path) as file:
        golden = {name: file[name] for name in file.files}
    state = {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}
    config = AutoencoderConfig(
        image_size=int(golden["config/resolution"]),
        image_channels=state["encoder.conv_in.weight"].shape[1],
        channels=int(golden["config/ch"]),
        multipliers=tuple(golden["config/ch_mult"].tolist()),
        latent_channels=int(golden["config/embed_dim"]),
    )
    params = from_torch(table(config), state, nn.unbox(abstract_params(config)))
    back = to_torch(table(config), params)
    assert sorted(back) == sorted(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name, strict=True)
    return config, params, golden


def check_autoencoder_file(path: Path) -> None:
    """Moments, posterior and decoded images to 1e-5 of the largest magnitude of each array."""
    config, params, golden = read_autoencoder_golden(path)
    variables, module = {"params": params}, Autoencoder(config)
    images = golden["in/images_nchw"].transpose(0, 2, 3, 1)
    moments = jax.jit(lambda v, x: module.apply(v, x, method="moments"))(variables, images)
    posterior = Posterior.from_moments(moments)
    mean = golden["out/mean"].transpose(0, 2, 3, 1)
    decoded = jax.jit(lambda v, x: module.apply(v, x, method="decode"))(variables, mean)
    for name, ours in (
        ("moments", moments),
        ("mean", posterior.mean),
        ("logvar_clipped", posterior.logvar),
        ("decoded_from_mean", decoded),
    ):
        theirs = golden[f"out/{name}"].transpose(0, 2, 3, 1)
        tolerance = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)
