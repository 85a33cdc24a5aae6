"""The network of `heads/conditioned_mlp.py` in PyTorch, float64."""

import math

import jax
import numpy as np
import torch


def leaves(params):
    """A tree of parameters as float64 tensors that gradients are taken of."""
    return jax.tree.map(
        lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True), params
    )


def network(state, feature, noisy, time):
    """The prediction `[draws, N, outputs * C]` at times 0 to 1000 `[draws, N]`.

    `state` has the names of the head's parameters, with stacked blocks.
    """
    linear = torch.nn.functional.linear
    silu, norm = torch.nn.functional.silu, torch.nn.functional.layer_norm

    def layer(name, x):
        return linear(x, *_matrix(state[name]))

    frequencies = torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    angles = time[..., None] * frequencies
    sinusoids = torch.cat([angles.cos(), angles.sin()], -1)
    y = layer("time_fc2", silu(layer("time_fc1", sinusoids))) + layer("condition_proj", feature)
    x = layer("input_proj", noisy)
    for i in range(len(state["blocks"]["norm"]["scale"])):
        block = jax.tree.map(lambda x, i=i: x[i], state["blocks"])
        shift, scale, gate = torch.chunk(linear(silu(y), *_matrix(block["modulation"])), 3, -1)
        h = norm(x, x.shape[-1:], block["norm"]["scale"], block["norm"]["bias"], 1e-6)
        h = silu(linear(h * (1 + scale) + shift, *_matrix(block["fc1"])))
        x = x + gate * linear(h, *_matrix(block["fc2"]))
    shift, scale = torch.chunk(layer("final_modulation", silu(y)), 2, -1)
    return layer("output", norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def _matrix(layer):
    kernel = layer["kernel"]
    return kernel.reshape(len(kernel), -1).T, layer["bias"].ravel()
