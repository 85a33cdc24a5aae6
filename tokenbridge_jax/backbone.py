"""Masked encoder-decoder over positions (paper section 3.3; the layout of MAR).

All arrays are in *order layout*: slot j of image b is position `order[b, j]`, and the first
`num_hidden` slots of an order are hidden. Attention does not depend on the arrangement of
positions, because each has its own position embedding. So the hidden slots are a slice at the
front and the visible slots a slice at the end: nothing is scattered, and every shape is static.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenbridge_jax.layers import Dense, LayerNorm, add_bias, copies, look_up
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.meshes import named_axes
from tokenbridge_jax.transformer import Block, LastApart, Window, embedding_init, stack_layers


class Backbone(nn.Module):
    """Predicts a feature for every position from the visible positions and the class.

    The encoder sees `buffer` copies of the class latent and the visible positions only. The decoder
    sees all positions, with a learned mask token at the hidden ones.
    """

    positions: int
    classes: int
    buffer: int
    encoder_width: int
    encoder_layers: int
    encoder_heads: int
    decoder_width: int
    decoder_layers: int
    decoder_heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_layers: bool = True
    float8: bool = False
    sampling: bool = False

    def setup(self) -> None:
        length = self.buffer + self.positions
        self.class_embedding = self._embedding("class_embedding", self.classes, self.encoder_width)
        self.null_latent = self._embedding("null_latent", 1, self.encoder_width)
        # In float32, which is cheap at this width: bfloat16 cannot distinguish 4096 levels.
        self.z_proj = Dense((self.encoder_width,), (None, "embed"))
        self.encoder_position = self._embedding("encoder_position", length, self.encoder_width)
        self.z_proj_norm = LayerNorm(self.dtype)
        self.encoder_blocks = self._blocks(self.encoder_layers, self.encoder_heads)
        self.encoder_norm = LayerNorm(self.dtype)

        self.decoder_embed = Dense((self.decoder_width,), (None, "embed"), self.dtype)
        self.mask_token = self._embedding("mask_token", 1, self.decoder_width)
        self.decoder_position = self._embedding("decoder_position", length, self.decoder_width)
        self.decoder_blocks = self._blocks(
            self.decoder_layers, self.decoder_heads, last_apart=self.sampling and self.scan_layers
        )
        self.decoder_norm = LayerNorm(self.dtype)
        self.output_position = self._embedding(
            "output_position", self.positions, self.decoder_width
        )

    def _blocks(self, layers: int, heads: int, last_apart: bool = False) -> Any:
        arguments = heads, self.dropout, self.dtype, self.float8
        stack = stack_layers(Block, layers - last_apart, self.remat, self.scan_layers)
        if not last_apart:
            return stack(*arguments)
        scan = functools.partial(stack, *arguments) if layers > 1 else None
        return LastApart(scan, functools.partial(Block, *arguments))

    def _embedding(self, name: str, count: int, width: int) -> Float[Array, "T D"]:
        init = named_axes(embedding_init, "positions", "embed")
        table = self.param(name, init, (count, width))
        # All-gathered before the look-up. A look-up in a part of the width would give each device
        # a part of every image's tokens, and those are much larger than the table.
        return meshes.constrain(table, None, None)

    def class_latent(
        self,
        labels: Int[Array, " B"] | Float[Array, "B {self.classes}"],
        drop_class: Bool[Array, " B"],
    ) -> Float[Array, "B E"]:
        """The content of the buffer: the class embedding, or the null latent if that is dropped.

        Args:
          labels: one class per image, or weights that mix the classes' embeddings. An image whose
            weights are all zero gets the null latent.
          drop_class: which images get the null latent instead of their class.
        """
        if labels.ndim == 2:
            # Exact, because a weight of 1 must give the same embedding as a look-up.
            table = self.class_embedding.astype(self.dtype)
            embedding = jnp.dot(labels, table, precision="highest")
            drop_class |= ~labels.any(axis=1)
        else:
            embedding = look_up(self.class_embedding, labels, jnp.float32)
        latent = jnp.where(drop_class[:, None], self.null_latent, embedding)
        return meshes.constrain(latent.astype(self.dtype), "batch", None)

    def encode(
        self,
        values: Float[Array, "B S C"],
        class_latent: Float[Array, "B E"],
        order: Int[Array, "B L"],
        num_hidden: Int[Array, "*b"],
    ) -> Float[Array, "B {self.buffer}+S E"]:
        """Runs buffer and visible slots through the encoder.

        Args:
          values: dequantized latents of the last S slots of `order`.
          class_latent: the content of the buffer.
          order: a permutation of the positions for each image.
          num_hidden: how many slots at the front are hidden, one number or one per image. Hidden
            slots among those of `values` are padding: nothing attends to them.
        """
        batch, slots, _ = values.shape
        position = self.buffer + order[:, self.positions - slots :]
        shape = (batch, self.buffer, self.encoder_width)
        x = jnp.concatenate(
            [
                add_bias(
                    copies(class_latent[:, None], shape, self.dtype),
                    self.encoder_position[: self.buffer],
                ),
                meshes.constrain(self.z_proj(values), "batch", None, None)
                + look_up(self.encoder_position, position, self.dtype),
            ],
            axis=1,
        )
        x = meshes.constrain(self.z_proj_norm(x), "batch", None, None)
        visible = self._visible(slots, num_hidden)
        mask = jnp.pad(visible, ((0, 0), (self.buffer, 0)), constant_values=True)
        x, _ = self.encoder_blocks(x, mask)
        return self.encoder_norm(x)

    def decode(
        self,
        encoded: Float[Array, "B T E"],
        order: Int[Array, "B L"],
        num_hidden: Int[Array, "*b"],
        window: Window | None = None,
    ) -> Float[Array, "B W D"]:
        """Features in order layout, from the result of `encode` (T slots).

        Args:
          encoded: buffer and visible slots.
          order: as for `encode`.
          num_hidden: as for `encode`.
          window: the slots to compute, all by default; only where the model is for sampling.
        """
        batch, slots = len(encoded), encoded.shape[1] - self.buffer
        x = meshes.constrain(self.decoder_embed(encoded), "batch", None, None)
        shape = (batch, self.positions, self.decoder_width)
        mask_token = copies(self.mask_token, shape, self.dtype)
        visible = self._visible(slots, num_hidden)[..., None]
        x = jnp.concatenate(
            [
                add_bias(x[:, : self.buffer], self.decoder_position[: self.buffer]),
                jnp.concatenate(
                    [
                        mask_token[:, slots:],
                        jnp.where(visible, x[:, self.buffer :], mask_token[:, :slots]),
                    ],
                    axis=1,
                )
                + look_up(self.decoder_position, self.buffer + order, self.dtype),
            ],
            axis=1,
        )
        x = meshes.constrain(x, "batch", None, None)
        if window is None:
            x, _ = self.decoder_blocks(x, None)
            x = x[:, self.buffer :]
        else:
            after_buffer = Window(window.start + self.buffer, window.size)
            x, _ = self.decoder_blocks(x, None, after_buffer)
            order = window.cut(order)
        x = self.decoder_norm(x) + look_up(self.output_position, order, self.dtype)
        return meshes.constrain(x, "batch", None, None)

    def __call__(
        self,
        values: Float[Array, "B S C"],
        class_latent: Float[Array, "B E"],
        order: Int[Array, "B L"],
        num_hidden: Int[Array, "*b"],
        window: Window | None = None,
    ) -> Float[Array, "B W D"]:
        """Features in order layout (see `encode` and `decode` for the arguments)."""
        encoded = self.encode(values, class_latent, order, num_hidden)
        return self.decode(encoded, order, num_hidden, window)

    def _visible(self, slots: int, num_hidden: Int[Array, "*b"]) -> Array:
        """Which of the last `slots` slots are visible: bool `[1 or B, S]`."""
        slot = jnp.arange(self.positions - slots, self.positions)
        return slot[None] >= jnp.reshape(num_hidden, (-1, 1))
