"""The parts of a config that the cases share, and random inputs for them.

No input is zero, because devices multiply zeros faster than other numbers.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.channels import resolve_channel_order
from tokenbridge_jax.config import autoencoder_config, check_values, model_config, of_latents
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.data.tokenizing import quantizer_of
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.model_config import SIZES, TokenBridgeConfig
from tokenbridge_jax.runtime import meshes

VIEWS = 2


def make_info(config: ConfigDict) -> DatasetInfo:
    """Describes shards for the model, with VIEWS views of every image, or its latents.

    Raises:
      UserError: the autoencoder has no such latents.
    """
    autoencoder = autoencoder_config(config)
    check_values(config, autoencoder)
    rule = config.quantizer.channel_order
    # "frequency" would need data; every order has the same speed.
    known = "identity" if rule == "frequency" else rule
    return DatasetInfo(
        quantizer=quantizer_of(config, autoencoder, random_codes(autoencoder)),
        autoencoder=autoencoder,
        autoencoder_hash="0" * 64,
        channel_order=resolve_channel_order(known, autoencoder.index_channels),
        channel_order_rule=str(rule),
        image_size=config.data.image_size,
        posterior_samples=VIEWS,
        flips=False,
        seed=config.seed,
        precision=config.tokenize.precision,
        class_names=tuple(map(str, range(config.data.num_classes))),
        records_per_shard=config.tokenize.records_per_shard,
        sources={},
        store="latents" if of_latents(config) else "indices",
    )


def random_codes(autoencoder: AutoencoderConfig) -> dict[str, Any]:
    """Parameters of an untrained codebook, as `quantizer_of` takes them."""
    shape = autoencoder.codes, autoencoder.latent_channels
    return {"codebook": {"codes": np.random.default_rng(0).normal(size=shape).astype(np.float32)}}


def make_model(config: ConfigDict) -> TokenBridgeConfig:
    """Makes the model of `config.model` for the shards of `make_info`.

    Raises:
      UserError: a value makes no sense.
    """
    info = make_info(config)
    return model_config(config, info.quantizer, info.channel_order, info.positions)


def describe_model(config: ConfigDict) -> dict[str, Any]:
    """Describes the model in the settings of a case: its published size, if any, and all keys."""
    model = config.model.to_dict()
    sizes = (name for name, fields in SIZES.items() if fields.items() <= model.items())
    return {"size": next(sizes, None), "model": model}


def random_like(abstract: Any, key: jax.Array) -> Any:
    """Random parameters of these shapes and dtypes: scales of norms about 1, all others about 0.

    All are slices of one draw: separate draws would take longer to compile than the case itself.
    """
    leaves, tree = jax.tree.flatten_with_path(abstract)
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    draw = 0.02 * jax.random.normal(key, (ends[-1],))
    # The barrier keeps the generator from being compiled into every slice.
    draws = jnp.split(jax.lax.optimization_barrier(draw), ends[:-1])
    params = [
        (draw + (path[-1].key == "scale")).reshape(leaf.shape).astype(leaf.dtype)
        for (path, leaf), draw in zip(leaves, draws, strict=True)
    ]
    return jax.tree.unflatten(tree, params)


def random_init(init: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Returns a function like `init` that sets no parameter to zero, not even AdaLN or biases."""

    def make(key: jax.Array) -> Any:
        boxed = jax.eval_shape(init, key)
        return meta.replace_boxed(boxed, random_like(nn.unbox(boxed), key))

    return make


def random_params(model: TokenBridgeConfig, mesh: Mesh) -> Any:
    """Parameters of a model on a mesh, with the shardings and dtypes that `Pipeline` loads."""
    abstract = abstract_params(model, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(functools.partial(random_like, abstract), out_shardings=shardings)
    return make(jax.random.key(0))


def random_batch(model: TokenBridgeConfig, batch: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Random indices (or latents) and labels of a global batch, in the form of a loader's."""
    rng, rows = np.random.default_rng(0), meshes.local_rows(mesh, batch)
    shape = batch, model.positions, model.channels
    values = rng.normal(size=shape) if model.of_latents else rng.integers(model.levels, size=shape)
    labels = rng.integers(model.classes, size=batch)
    local = {
        "indices": values[rows].astype(model.quantizer.index_dtype),
        "labels": labels[rows].astype(np.int32),
    }
    return meshes.to_global(local, mesh)
