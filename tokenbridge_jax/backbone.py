"""Masked encoder-decoder over positions (paper section 3.3; the layout of MAR).

Everything inside lives in *order layout*: slot j of image b is position `order[b, j]`, and an
order's first `num_hidden` slots are the hidden ones. Attention does not care how positions are
arranged as long as each carries its own position embedding, so hidden slots are a plain slice at
the front and visible slots one at the end: nothing is scattered, and every shape is static.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenbridge_jax.layers import Dense, add_bias, copies
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.meshes import named_axes
from tokenbridge_jax.transformer import Block, Window, embedding_init, layer_norm, stack_layers


class Backbone(nn.Module):
    """Predicts a feature for every position from the visible ones and the class.

    The encoder sees `buffer` copies of the class latent and the visible positions only; the decoder
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
    unrolled: bool = False

    def setup(self) -> None:
        encoder_length = self.buffer + self.positions
        self.class_embedding = self._embedding("class_embedding", self.classes, self.encoder_width)
        self.null_latent = self._embedding("null_latent", 1, self.encoder_width)
        # In float32, which costs nothing at this width: bfloat16 tells few of 4096 levels apart.
        self.z_proj = Dense(self.encoder_width, (None, "embed"))
        self.encoder_position = self._embedding(
            "encoder_position", encoder_length, self.encoder_width
        )
        self.z_proj_norm = layer_norm(self.dtype)
        self.encoder_blocks = stack_layers(Block, self.encoder_layers, self.remat, self.unrolled)(
            self.encoder_heads, self.dropout, self.dtype
        )
        self.encoder_norm = layer_norm(self.dtype)

        self.decoder_embed = Dense(self.decoder_width, (None, "embed"), self.dtype)
        self.mask_token = self._embedding("mask_token", 1, self.decoder_width)
        self.decoder_position = self._embedding(
            "decoder_position", encoder_length, self.decoder_width
        )
        self.decoder_blocks = stack_layers(Block, self.decoder_layers, self.remat, self.unrolled)(
            self.decoder_heads, self.dropout, self.dtype
        )
        self.decoder_norm = layer_norm(self.dtype)
        self.output_position = self._embedding(
            "output_position", self.positions, self.decoder_width
        )

    def _embedding(self, name: str, count: int, width: int) -> Float[Array, "T D"]:
        init = named_axes(embedding_init, "positions", "embed")
        table = self.param(name, init, (count, width))
        # Gathered before it is looked up in: a look-up in a part of the width would give a part of
        # every image's tokens, which are much larger than the table and would have to travel.
        return meshes.constrain(table, None, None)

    def class_latent(
        self,
        labels: Int[Array, " B"] | Float[Array, "B {self.classes}"],
        drop_class: Bool[Array, " B"],
    ) -> Float[Array, "B E"]:
        """What fills the buffer: the class embedding, or the null latent where it is dropped.

        Args:
          labels: a class an image, or weights that mix the classes' embeddings; no class at all
            where they are all zero.
          drop_class: where the null latent takes the place of the class.
        """
        if labels.ndim == 2:
            # As exact as looking up: a weight of 1 has to give the embedding itself.
            table = self.class_embedding.astype(self.dtype)
            embedding = jnp.dot(labels, table, precision="highest")
            drop_class |= ~labels.any(axis=1)
        else:
            embedding = self.class_embedding[labels]
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
          class_latent: what fills the buffer.
          order: a permutation of the positions for each image.
          num_hidden: how many slots at the front are hidden, one number or one an image. Slots of
            `values` that are hidden all the same are padding: nothing attends to them.
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
                + self.encoder_position[position].astype(self.dtype),
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
        """Features in order layout, from what `encode` returned (T slots).

        Args:
          encoded: buffer and visible slots.
          order: as for `encode`.
          num_hidden: as for `encode`.
          window: the slots whose features are asked for, of an unrolled model; all by default.
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
                + self.decoder_position[self.buffer + order].astype(self.dtype),
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
        x = self.decoder_norm(x) + self.output_position[order].astype(self.dtype)
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
