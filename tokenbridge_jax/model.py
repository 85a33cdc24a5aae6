"""TokenBridge = backbone over positions + head; its loss is in `loss.py`."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Shaped

from tokenbridge_jax.backbone import Backbone
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.model_config import TokenBridgeConfig, make_head
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.transformer import Window, set_last_apart, unstack


class TokenBridge(nn.Module):
    """The generator: a distribution over the indices of hidden positions given the visible ones.

    With `config.scan_layers` it takes parameters as they are stored. Without, every layer has its
    own (see `transformer.unstack`). `sampling` makes the model that samples, and takes the
    parameters of `prepare_params`.
    """

    config: TokenBridgeConfig
    sampling: bool = False

    def setup(self) -> None:
        # The fields of a backbone are fields of the config too.
        names = {field.name for field in dataclasses.fields(Backbone)}
        names -= {"parent", "name", "sampling"}
        settings = {name: getattr(self.config, name) for name in names}
        settings["dtype"] = jnp.dtype(self.config.dtype)
        self.backbone = Backbone(**settings, sampling=self.sampling)
        unrolled = dataclasses.replace(self.config, scan_layers=False)
        self.head = make_head(unrolled if self.sampling else self.config)

    def __call__(
        self,
        indices: Integer[Array, "B L C"],
        labels: Int[Array, " B"],
        order: Int[Array, "B L"],
        num_hidden: Int[Array, "*b"],
        drop_class: Bool[Array, " B"],
    ) -> Float[Array, "B L C V"]:
        """Teacher-forced logits of every slot, in order layout and channel order.

        For inspection and tests: all B x L x C x V logits exist at once.
        """
        slots = jnp.take_along_axis(indices, order[:, :, None], axis=1)
        feature = self.features(slots, labels, order, num_hidden, drop_class)
        return self.logits(feature, slots)

    def features(
        self,
        visible: Shaped[Array, "B S C"],
        labels: Int[Array, " B"] | Float[Array, "B classes"],
        order: Int[Array, "B L"],
        num_hidden: Int[Array, "*b"],
        drop_class: Bool[Array, " B"],
        window: Window | None = None,
    ) -> Float[Array, "B W D"]:
        """The backbone's features, in order layout.

        Args:
          visible: values at the last S slots of `order`; hidden ones are ignored.
          labels: classes, or weights of them (see `Backbone.class_latent`).
          order: a permutation of the positions for each image.
          num_hidden: how many slots at the front of `order` are hidden, one number or one per
            image.
          drop_class: which images get the null latent instead of their class.
          window: the slots to compute, all by default; only with `sampling`.
        """
        values = self.config.quantizer.dequantize(visible)
        class_latent = self.backbone.class_latent(labels, drop_class)
        return self.backbone(values, class_latent, order, num_hidden, window)

    def logits(
        self,
        feature: Float[Array, "B M D"],
        indices: Shaped[Array, "B M C"],
        as_sampled: bool = False,
    ) -> Float[Array, "B M C V"]:
        """The head's teacher-forced logits at M positions per image; see `Head.logits`."""
        logits = self.head.logits(merge(feature), merge(indices), as_sampled)
        return logits.reshape(*indices.shape, self.config.levels)

    def nll(
        self,
        feature: Float[Array, "B M D"],
        values: Shaped[Array, "B M C"],
        as_sampled: bool = False,
    ) -> Float[Array, "B M C"]:
        """Every value's negative log-likelihood in nats, in autoencoder order; see `Head.nll`."""
        return self.head.nll(merge(feature), merge(values), as_sampled).reshape(values.shape)

    def loss(
        self,
        feature: Float[Array, "B M D"],
        targets: Shaped[Array, "B M C"],
        slots: Int[Array, " M"],
        key: Key[Array, ""],
    ) -> Float[Array, "B M C"]:
        """What training minimises at M positions per image; see `Head.loss`.

        What the head draws depends on the key, the image's place in the whole batch and the number
        of the slot.
        """
        batch = len(targets)
        rows = jnp.arange(batch) + (meshes.batch_shard() * batch if meshes.in_shard() else 0)
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = jax.vmap(fold, (0, None))(fold(key, rows), slots)
        losses = self.head.loss(merge(feature), merge(targets), keys.reshape(-1))
        return losses.reshape(targets.shape)

    def sample_positions(
        self,
        feature: Float[Array, "B R D"],
        keys: Key[Array, "B R"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Shaped[Array, "B R C"], Float[Array, "B R"] | None]:
        """Draws R positions per image from their features: values and the positions'
        log-probabilities (see `Head.sample`).
        """
        if guidance is not None:
            guidance = guidance._replace(null=merge(guidance.null))
        values, log_probs = self.head.sample(
            merge(feature), keys.reshape(-1), temperature, guidance
        )
        if log_probs is not None:
            log_probs = log_probs.reshape(keys.shape)
        return values.reshape(*keys.shape, -1), log_probs


def merge(x: Shaped[Array, "B M ..."]) -> Shaped[Array, "B*M ..."]:
    """Joins the first two axes: images and slots become the N positions of the head."""
    return x.reshape(-1, *x.shape[2:])


@functools.partial(jax.jit, static_argnames="config")  # Traced once outside a mesh.
def init_params(config: TokenBridgeConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Draws the model's parameters as they are stored, boxed with their logical axis names."""
    config = dataclasses.replace(config, scan_layers=True)
    order = jnp.arange(config.positions)[None]
    values = jnp.zeros((1, config.positions, config.channels), config.value_dtype)
    label = jnp.zeros(1, jnp.int32)

    def all_parts(model: TokenBridge) -> None:
        feature = model.features(values, label, order, jnp.int32(config.positions), label == 1)
        model.loss(feature, values, order[0], jax.random.key(0))

    return TokenBridge(config).init(key, method=all_parts)["params"]


def abstract_params(config: TokenBridgeConfig, mesh: Mesh | None = None) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, without their boxes; on a mesh also their shardings."""
    boxed = _boxed_params(config)
    return nn.unbox(boxed) if mesh is None else meshes.abstract_arrays(boxed, mesh)


@functools.cache
def _boxed_params(config: TokenBridgeConfig) -> dict[str, Any]:
    with jax.enable_x64(False):
        return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def prepare_params(params: dict[str, Any], config: TokenBridgeConfig) -> dict[str, Any]:
    """Parameters for a model with `sampling`, in the dtypes that its modules compute in.

    All are cast to `config.dtype` except those of norms, `z_proj` and `Head.float32_params`.
    """
    of_float32 = ("norm", "z_proj", *config.float32_params)

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        exact = any(part in name for part in of_float32)
        return leaf if exact else leaf.astype(config.dtype)

    params = jax.tree_util.tree_map_with_path(cast, params)
    if not config.scan_layers:
        return unstack(params)
    backbone = params["backbone"]
    decoder = {"decoder_blocks": set_last_apart(backbone["decoder_blocks"])}
    return unstack({"head": params["head"]}) | {"backbone": backbone | decoder}
