"""TokenBridge = backbone over positions + channel head, and its loss.

Shapes are static: of the L slots of an order (see `backbone.py`), the last S go to the encoder and
the first M to the head. A batch hides `num_hidden` positions, a traced number with
`L - S <= num_hidden <= M`; slots beyond it are padding, which no attention and no loss counts.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from tokenbridge_jax.backbone import Backbone
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.heads.channel_ar import ChannelAR
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.transformer import REMAT_POLICIES

SIZES = {
    "B": dict(
        encoder_width=768, encoder_layers=12, encoder_heads=12,
        decoder_width=768, decoder_layers=12, decoder_heads=12,
        head_width=768, head_layers=4, head_heads=8,
    ),
    "L": dict(
        encoder_width=1024, encoder_layers=16, encoder_heads=16,
        decoder_width=1024, decoder_layers=16, decoder_heads=16,
        head_width=1024, head_layers=4, head_heads=8,
    ),
    "H": dict(
        encoder_width=1280, encoder_layers=20, encoder_heads=16,
        decoder_width=1280, decoder_layers=20, decoder_heads=16,
        head_width=1024, head_layers=6, head_heads=8,
    ),
}  # fmt: skip

# What activations may be computed in; parameters, norms, softmax and logits are always float32.
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TokenBridgeConfig:
    """Everything that fixes the function a set of parameters computes, and how it is computed.

    `dtype`, `remat` and `head_chunk` change memory and speed only. `head_chunk` is how many hidden
    slots of every image go through the head at once in `TokenBridge.loss`; the activations of a
    chunk are computed again in the backward pass, so neither they nor the logits ever exist for
    more than one chunk. 0 puts all slots through at once and keeps everything.

    Raises:
      UserError: on construction, if the sizes make no model.
    """

    quantizer: Quantizer
    channel_order: tuple[int, ...]
    positions: int = 256
    classes: int = 1000
    encoder_width: int = 1024
    encoder_layers: int = 16
    encoder_heads: int = 16
    decoder_width: int = 1024
    decoder_layers: int = 16
    decoder_heads: int = 16
    head_width: int = 1024
    head_layers: int = 4
    head_heads: int = 8
    buffer: int = 64
    dropout: float = 0.1
    first_token_quirk: bool = False
    dtype: str = "bfloat16"
    remat: str = "none"
    head_chunk: int = 16

    def __post_init__(self) -> None:
        if sorted(self.channel_order) != list(range(self.channels)) or self.channels < 2:
            raise UserError(
                f"channel order {self.channel_order} must list each of 0..C-1 once, with C >= 2"
            )
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "head_chunk" else 1
            if field.type is int and value < least:
                raise UserError(f"model.{field.name}={value} must be at least {least}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        for part in ("encoder", "decoder", "head"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                raise UserError(
                    f"model.{part}_width={width} does not divide into {part}_heads={heads}"
                )
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat='{self.remat}' is not one of {', '.join(REMAT_POLICIES)}")
        if self.dtype not in DTYPES:
            raise UserError(f"model.dtype='{self.dtype}' is not one of {', '.join(DTYPES)}")

    @property
    def channels(self) -> int:
        """C, the number of latent channels of a position."""
        return len(self.channel_order)

    @property
    def levels(self) -> int:
        """V, the number of values a channel can take."""
        return self.quantizer.levels

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal config."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {
            "quantizer": self.quantizer.to_json(),
            "channel_order": list(self.channel_order),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TokenBridgeConfig":
        """Inverse of `to_json`."""
        return cls(
            **value
            | {
                "quantizer": Quantizer.from_json(value["quantizer"]),
                "channel_order": tuple(value["channel_order"]),
            }
        )

    def forward_flops(self, hidden: float | int) -> float | int:
        """Matmul FLOPs of one image's forward pass with `hidden` positions hidden, no padding.

        Counted by hand: a product of [m, k] with [k, n] is 2mkn; embeddings, norms and the softmax
        count nothing. Attention of the head counts all C x C scores, though half are masked.
        """

        def block(tokens: float | int, attended: float | int, width: int, modulation: int = 0):
            linear = 2 * tokens * width * width * (4 + 8 + modulation)
            return linear + 4 * tokens * attended * width

        encoded = self.buffer + self.positions - hidden
        decoded = self.buffer + self.positions
        width, channels = self.head_width, self.channels
        head = self.head_layers * block(channels, channels, width, modulation=6)
        head += 2 * self.decoder_width * width  # condition_proj
        head += channels * 2 * width * (2 * width + self.levels)  # final modulation, classifiers
        return (
            2 * (self.positions - hidden) * self.channels * self.encoder_width
            + self.encoder_layers * block(encoded, encoded, self.encoder_width)
            + 2 * encoded * self.encoder_width * self.decoder_width
            + self.decoder_layers * block(decoded, decoded, self.decoder_width)
            + hidden * head
        )


class TokenBridge(nn.Module):
    """The generator: a distribution over the indices of hidden positions given the visible ones."""

    config: TokenBridgeConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.backbone = Backbone(
            positions=c.positions,
            classes=c.classes,
            buffer=c.buffer,
            encoder_width=c.encoder_width,
            encoder_layers=c.encoder_layers,
            encoder_heads=c.encoder_heads,
            decoder_width=c.decoder_width,
            decoder_layers=c.decoder_layers,
            decoder_heads=c.decoder_heads,
            dropout=c.dropout,
            dtype=dtype,
            remat=c.remat,
        )
        self.head = ChannelAR(
            channel_order=c.channel_order,
            levels=c.levels,
            width=c.head_width,
            layers=c.head_layers,
            heads=c.head_heads,
            dropout=c.dropout,
            dtype=dtype,
            first_token_quirk=c.first_token_quirk,
        )

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
        logits = self.head.logits(_merge(feature), _merge(slots))
        return logits.reshape(*indices.shape, self.config.levels)

    def features(
        self,
        visible_indices: Integer[Array, "B S C"],
        labels: Int[Array, " B"],
        order: Int[Array, "B L"],
        num_hidden: Int[Array, "*b"],
        drop_class: Bool[Array, " B"],
    ) -> Float[Array, "B L D"]:
        """The backbone's features of all slots, in order layout.

        Args:
          visible_indices: indices at the last S slots of `order`; hidden ones among them count for
            nothing.
          labels: classes.
          order: a permutation of the positions for each image.
          num_hidden: how many slots at the front of `order` are hidden, one number or one an image.
          drop_class: where the null latent takes the place of the class.
        """
        values = self.config.quantizer.dequantize(visible_indices)
        class_latent = self.backbone.class_latent(labels, drop_class)
        return self.backbone(values, class_latent, order, num_hidden)

    def loss(
        self,
        indices: Integer[Array, "B L C"],
        labels: Int[Array, " B"],
        order: Int[Array, "B L"],
        num_hidden: Int[Array, ""],
        drop_class: Bool[Array, " B"],
        *,
        hidden_slots: int,
        visible_slots: int,
    ) -> tuple[Float[Array, ""], Float[Array, " C"]]:
        """Mean cross-entropy in nats over hidden positions and channels (paper eq. 6).

        Args: as for `image_nll`.

        Returns:
          The loss, and its mean for every channel, in autoencoder order.
        """
        nll = self.image_nll(
            indices,
            labels,
            order,
            num_hidden,
            drop_class,
            hidden_slots=hidden_slots,
            visible_slots=visible_slots,
        )
        per_channel = jnp.mean(nll, axis=0)
        return jnp.mean(per_channel), per_channel

    def image_nll(
        self,
        indices: Integer[Array, "B L C"],
        labels: Int[Array, " B"],
        order: Int[Array, "B L"],
        num_hidden: Int[Array, ""],
        drop_class: Bool[Array, " B"],
        *,
        hidden_slots: int,
        visible_slots: int,
    ) -> Float[Array, "B C"]:
        """Every image's cross-entropy in nats: its mean over hidden positions, for each channel.

        Args:
          hidden_slots: M, at least `num_hidden`.
          visible_slots: S, at least `L - num_hidden`.
        """
        slots = jnp.take_along_axis(indices, order[:, :, None], axis=1)
        visible = slots[:, self.config.positions - visible_slots :]
        feature = self.features(visible, labels, order, num_hidden, drop_class)
        nll = self._chunked_nll(feature[:, :hidden_slots], slots[:, :hidden_slots])
        hidden = (jnp.arange(hidden_slots) < num_hidden)[None, :, None]
        return jnp.sum(jnp.where(hidden, nll, 0), axis=1) / num_hidden

    def _chunked_nll(
        self, feature: Float[Array, "B M D"], indices: Integer[Array, "B M C"]
    ) -> Float[Array, "B M C"]:
        batch, slots, channels = indices.shape
        if not self.config.head_chunk:
            return self.head.nll(_merge(feature), _merge(indices)).reshape(indices.shape)
        chunk = min(self.config.head_chunk, slots)
        count = -(-slots // chunk)

        def split(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (0, count * chunk - slots), (0, 0)))
            return x.reshape(batch, count, chunk, -1).swapaxes(0, 1)

        def chunk_nll(
            model: "TokenBridge", carry: None, xs: tuple[jax.Array, jax.Array]
        ) -> tuple[None, jax.Array]:
            feature, indices = xs
            nll = model.head.nll(_merge(feature), _merge(indices))
            return carry, nll.reshape(indices.shape)

        scan = nn.scan(
            nn.remat(chunk_nll, prevent_cse=False),
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
        )
        _, nll = scan(self, None, (split(feature), split(indices)))
        return nll.swapaxes(0, 1).reshape(batch, count * chunk, channels)[:, :slots]

    def sample_positions(
        self,
        feature: Float[Array, "B R D"],
        keys: Key[Array, "B R"],
        temperature: Float[Array, ""],
    ) -> Int[Array, "B R C"]:
        """Draws the indices of R positions an image from their features."""
        indices = self.head.sample(_merge(feature), keys.reshape(-1), temperature)
        return indices.reshape(*keys.shape, -1)


def _merge(x: jax.Array) -> jax.Array:
    """Joins the first two axes: images and slots become the head's N positions."""
    return x.reshape(-1, *x.shape[2:])


def init_params(config: TokenBridgeConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Draws the model's parameters, boxed with their logical axis names.

    Use it under `jax.eval_shape` or `jax.jit`; traced, its forward pass costs nothing.
    """
    order = jnp.arange(config.positions)[None]
    indices = jnp.zeros((1, config.positions, config.channels), jnp.int32)
    label = jnp.zeros(1, jnp.int32)
    hidden = jnp.int32(config.positions)
    variables = TokenBridge(config).init(key, indices, label, order, hidden, label == 1)
    return variables["params"]


def abstract_params(config: TokenBridgeConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, without their boxes."""
    return nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
