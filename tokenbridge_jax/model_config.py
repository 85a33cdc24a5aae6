"""The sizes and settings of a model, and the head that they name."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from tokenbridge_jax.heads.channel_ar import ChannelAR
from tokenbridge_jax.heads.diffusion import DiffusionHead
from tokenbridge_jax.heads.flow import FlowHead
from tokenbridge_jax.heads.grouped import GroupedHead
from tokenbridge_jax.heads.head import Activations, Head
from tokenbridge_jax.heads.independent import IndependentHead
from tokenbridge_jax.heads.masked import MaskedHead
from tokenbridge_jax.heads.mixture import MixtureHead
from tokenbridge_jax.quantizer import AnyQuantizer, Unquantized, quantizer_from_json
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.transformer import REMAT_POLICIES, block_flops

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

HEADS: dict[str, Any] = {
    "channel_ar": ChannelAR,
    "parallel": IndependentHead,
    "masked": MaskedHead,
    "diffusion": DiffusionHead,
    "flow": FlowHead,
    "mixture": MixtureHead,
}

# Every joint class has a column of the classifier, which would dominate a head with more of them.
MAX_JOINT_CLASSES = 2**16

# The dtypes of activations; parameters, norms, softmax and logits are always float32.
DTYPES = ("float32", "bfloat16")


def _changeable(default: Any, drawing: bool = False) -> Any:
    """A field that may change while a model is trained: the parameters still fit.

    One that drawing uses may also change after training.
    """
    return dataclasses.field(default=default, metadata={"changeable": True, "drawing": drawing})


@dataclasses.dataclass(frozen=True)
class TokenBridgeConfig:
    """The function that a set of parameters computes, and how to compute it.

    `head` is one of `HEADS`. If `channels_per_group` is above 1, the head predicts groups of so
    many neighbours in the channel order as joint classes. (Both are ablations of the paper.) Heads
    of latents have an `Unquantized` in place of a quantizer and no channel order. `head_draws` and
    `head_steps` are the draws in training and the steps in sampling of the heads diffusion and
    flow; `head_clip` bounds the latents that diffusion predicts in a step (0: no bound), and
    `head_solver` is how flow makes a step. `head_components` and `head_proposals` are the
    mixture's components and the draws that its guidance chooses from. `reveal_steps` and
    `reveal_order` are the masked head's.

    `dtype`, `remat`, `scan_layers` and `head_chunk` only change memory and speed; the last two also
    change the draws of dropout. `scan_layers` makes one small program for all layers, which
    compiles faster and runs slower. It gathers parameters that fsdp splits one layer at a time.
    Without it and without remat, parameters gathered in the forward pass are kept until the
    backward pass. `head_chunk` is the number of positions of a device that go through the head at
    once in the loss; the head's activations and logits exist for so many only. (At size L a
    position takes about 5 MB.)

    `float8` rounds the operands of the products in the layers of the backbone and of the head to 8
    bits (see `ops/float8.py`). It changes the results a little, in training and in sampling.

    Raises:
      UserError: on construction, if the sizes make no model.
    """

    quantizer: AnyQuantizer
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
    head: str = "channel_ar"
    channels_per_group: int = 1
    head_draws: int = _changeable(4)
    head_steps: int = _changeable(100, drawing=True)
    head_clip: float = _changeable(0.0, drawing=True)
    head_solver: str = _changeable("heun", drawing=True)
    head_components: int = 16
    head_proposals: int = _changeable(256, drawing=True)
    reveal_steps: int = _changeable(4, drawing=True)
    reveal_order: str = "fixed"
    buffer: int = 64
    dropout: float = _changeable(0.1)
    first_token_quirk: bool = False
    dtype: str = _changeable("bfloat16")
    remat: str = _changeable("none")
    scan_layers: bool = _changeable(True)
    head_chunk: int = _changeable(4096)
    float8: bool = _changeable(False, drawing=True)

    def __post_init__(self) -> None:
        if sorted(self.channel_order) != list(range(self.channels)) or not self.channels:
            raise UserError(
                f"channel order {self.channel_order} must list each of 0..C-1 once, with C >= 1"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise UserError(f"model.{field.name}={value} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        self._check_head()
        for part in ("encoder", "decoder", "head"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads and not (part == "head" and self.of_latents):
                raise UserError(
                    f"model.{part}_width={width} does not divide into {part}_heads={heads}"
                )
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat='{self.remat}' is not one of {', '.join(REMAT_POLICIES)}")
        if type(self.float8) is not bool:
            raise UserError(f"model.float8={self.float8!r} must be True or False")
        if self.dtype not in DTYPES:
            raise UserError(f"model.dtype='{self.dtype}' is not one of {', '.join(DTYPES)}")

    def _check_head(self) -> None:
        if self.head not in HEADS:
            raise UserError(f"model.head='{self.head}' is not one of {', '.join(HEADS)}")
        if self.of_latents != isinstance(self.quantizer, Unquantized):
            held, needed = ("indices", "latents") if self.of_latents else ("latents", "indices")
            raise UserError(
                f"model.head='{self.head}' needs {needed}, not {held}; tokenize the images again "
                f"with --config.tokenize.store={needed}"
            )
        if self.first_token_quirk and not (HEADS[self.head].has_quirk and self.is_published):
            raise UserError(
                "model.first_token_quirk is for imported weights: model.head='channel_ar' with one "
                "channel a group"
            )
        HEADS[self.head].check_config(self)
        if not HEADS[self.head].has_groups and self.channels_per_group > 1:
            raise UserError(
                f"model.head='{self.head}' has no groups of channels; set "
                "model.channels_per_group=1"
            )
        group = f"model.channels_per_group={self.channels_per_group}"
        if self.channels % self.channels_per_group or not self.groups:
            raise UserError(f"{group} must divide {self.channels} channels into groups")
        if self.groups < HEADS[self.head].least_places:
            raise UserError(
                f"model.head='{self.head}' predicts one channel or group after another, but there "
                "is only one; set model.head=parallel"
            )
        if self.joint_classes > MAX_JOINT_CLASSES:
            raise UserError(
                f"{group} of {self.levels} levels makes {self.joint_classes} joint classes, more "
                f"than {MAX_JOINT_CLASSES}; use smaller groups or fewer levels"
            )

    @property
    def is_published(self) -> bool:
        """Whether weights were released for this kind of head."""
        return bool(HEADS[self.head].is_published) and self.channels_per_group == 1

    @property
    def of_latents(self) -> bool:
        """Whether the head's values are latents and not indices."""
        of_latents: bool = HEADS[self.head].of_latents
        return of_latents

    @property
    def head_activations(self) -> Activations:
        """What training keeps of a position in the head; see `Head.activations`."""
        activations: Activations = HEADS[self.head].activations(self)
        return activations

    @property
    def float32_params(self) -> tuple[str, ...]:
        """Of the head; see `Head`."""
        names: tuple[str, ...] = HEADS[self.head].float32_params
        return names

    @property
    def has_probabilities(self) -> bool:
        """Whether the head knows the probability of its values, or their density."""
        return make_head(self).has_probabilities

    @property
    def value_dtype(self) -> Any:
        """Of the values on devices."""
        return jnp.float32 if self.of_latents else jnp.int32

    @property
    def groups(self) -> int:
        """The number of places in the head's sequence."""
        return self.channels // self.channels_per_group

    @property
    def joint_classes(self) -> int:
        """The number of classes of each place."""
        return self.levels**self.channels_per_group

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
        order = list(self.channel_order)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"quantizer": self.quantizer.to_json(), "channel_order": order}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TokenBridgeConfig":
        """Inverse of `to_json`."""
        quantizer = quantizer_from_json(value["quantizer"])
        order = tuple(value["channel_order"])
        return cls(**value | {"quantizer": quantizer, "channel_order": order})

    def forward_flops(self, hidden: float | int, scored: float | int | None = None) -> float | int:
        """Matmul FLOPs of one image's forward pass with `hidden` positions hidden, no padding.

        `scored` of the hidden positions go through the head, all by default. Counted by hand: a
        product of [m, k] with [k, n] is 2mkn; embeddings, norms and the softmax are not counted.
        """
        latents = self.channels * self.quantizer.latents_per_index
        encoded = self.buffer + self.positions - hidden
        decoded = self.buffer + self.positions
        head: int = HEADS[self.head].position_flops(self)
        return (
            2 * (self.positions - hidden) * latents * self.encoder_width
            + self.encoder_layers * block_flops(encoded, encoded, self.encoder_width)
            + 2 * encoded * self.encoder_width * self.decoder_width
            + self.decoder_layers * block_flops(decoded, decoded, self.decoder_width)
            + (hidden if scored is None else scored) * head
        )


# The fields that a run fixes, and those that drawing uses.
_FIELDS = dataclasses.fields(TokenBridgeConfig)
FIXED_FIELDS = tuple(field.name for field in _FIELDS if not field.metadata.get("changeable"))
DRAWING_FIELDS = tuple(field.name for field in _FIELDS if field.metadata.get("drawing"))


def make_head(config: TokenBridgeConfig) -> Head:
    """The head that a config names."""
    if config.of_latents:
        head: Head = HEADS[config.head].from_config(config)
        return head
    is_grouped = config.channels_per_group > 1
    order = tuple(range(config.groups)) if is_grouped else config.channel_order
    make = functools.partial(HEADS[config.head].from_config, config, order, config.joint_classes)
    if not is_grouped:
        return make()
    return GroupedHead(config.channel_order, config.levels, config.channels_per_group, make)
