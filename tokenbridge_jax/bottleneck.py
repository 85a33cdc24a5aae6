"""Trained codebooks, in place of an autoencoder's posterior: its latents are finitely many vectors.

Here z is the encoder's output for a position, D numbers, and q what the decoder gets for it:

    vq     Vector quantization as in ViT-VQGAN (Yu et al., 2022, arXiv 2110.04627, section 3.2): z
           and V learned codes have length 1, and q is the nearest code. A position has one channel
           with V levels. D is small, such as 8, and with the length 1 this keeps codes from dying.
    lfq    Lookup-free quantization (MAGVIT-2, Yu et al., 2024, arXiv 2310.05737, section 3.1): q
           is the sign of every number. A position has D channels with 2 levels. A head with
           `channels_per_group` predicts several bits as one class. The parallel head can predict
           all of up to 16 as one of 2^D codes.
    fsq    Finite scalar quantization (Mentzer et al., 2024, arXiv 2309.15505, section 3.1 and
           appendix A.1): every number is bounded by a tanh and rounded to one of V levels. A
           position has D channels with V levels.

Rounding has no gradient, so z gets that of q ("straight-through"). Codes of vq follow the encoder
by a loss of their own.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokenbridge_jax.layers import look_up
from tokenbridge_jax.quantizer import MAX_LEVELS, SCALE_LIMIT, Codebook, Quantizer
from tokenbridge_jax.runtime.errors import UserError

# Bits of lfq whose joint entropy is computed exactly.
ENTROPY_BITS = 9
# Keeps the bounded numbers of fsq away from the point between two levels (appendix A.1).
FSQ_MARGIN = 1e-3


class Quantized(NamedTuple):
    """Codes for a batch of images, and what training needs.

    Attributes:
      latents: q, float32; its gradient passes on to z.
      terms: of the loss, by name: `commitment`, the mean of (z - q)^2 with its gradient for z only;
        of vq also `codebook`, the same for the codes; of lfq also `entropy`.
    """

    latents: Float[Array, "... D"]
    terms: dict[str, Float[Array, ""]]


class Bottleneck:
    """What is put in place of the posterior; see the module.

    Attributes:
      has_codes: whether there are learned codes: V vectors, which `quantize` takes.
      commits: whether the commitment is part of the loss.
    """

    has_codes: ClassVar[bool] = False
    commits: ClassVar[bool] = True

    def quantize(
        self, z: Float[Array, "... D"], codes: Float[Array, "V D"] | None = None
    ) -> Quantized:
        """The codes of the encoder's output."""
        raise NotImplementedError

    def quantizer(
        self, codes: Float[Array | np.ndarray, "V D"] | None = None
    ) -> Quantizer | Codebook:
        """Turns the latents of `quantize` into indices and back."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class VectorBottleneck(Bottleneck):
    """vq, with `levels` codes."""

    levels: int
    has_codes: ClassVar[bool] = True

    def quantize(
        self, z: Float[Array, "... D"], codes: Float[Array, "V D"] | None = None
    ) -> Quantized:
        """See `Bottleneck.quantize`; the codes need not have length 1."""
        assert codes is not None
        z, codes = _unit(z), _unit(codes)
        # For vectors of length 1, the nearest has the largest product.
        products = jnp.matmul(*jax.lax.stop_gradient((z, codes.T)), precision="highest")
        nearest = look_up(codes, jnp.argmax(products, axis=-1), jnp.float32)
        terms = {
            "commitment": _mean_square(z - jax.lax.stop_gradient(nearest)),
            "codebook": _mean_square(jax.lax.stop_gradient(z) - nearest),
        }
        return Quantized(straight_through(z, nearest), terms)

    def quantizer(self, codes: Float[Array | np.ndarray, "V D"] | None = None) -> Codebook:
        """See `Bottleneck.quantizer`."""
        return Codebook(np.asarray(_unit(jnp.asarray(codes))))


class SignBottleneck(Bottleneck):
    """lfq."""

    def quantize(
        self, z: Float[Array, "... D"], codes: Float[Array, "V D"] | None = None
    ) -> Quantized:
        """See `Bottleneck.quantize`; 0 has the sign -1."""
        signs = jnp.where(z > 0, 1.0, -1.0)
        terms = {"commitment": _mean_square(z - signs), "entropy": entropy_penalty(z)}
        return Quantized(straight_through(z, signs), terms)

    def quantizer(self, codes: Float[Array | np.ndarray, "V D"] | None = None) -> Quantizer:
        """See `Bottleneck.quantizer`."""
        return Quantizer((-SCALE_LIMIT, SCALE_LIMIT), -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class ScalarBottleneck(Bottleneck):
    """fsq, with `levels` levels of every channel."""

    levels: int
    commits: ClassVar[bool] = False

    def quantize(
        self, z: Float[Array, "... D"], codes: Float[Array, "V D"] | None = None
    ) -> Quantized:
        """See `Bottleneck.quantize`; `commitment` is of the bounded z."""
        half = (self.levels - 1) * (1 - FSQ_MARGIN) / 2
        # An even number of levels has one more below 0 than above.
        offset = 0.0 if self.levels % 2 else 0.5
        bounded = jnp.tanh(z + math.tan(offset / half)) * half - offset
        bounded, rounded = (x / (self.levels // 2) for x in (bounded, jnp.round(bounded)))
        terms = {"commitment": _mean_square(bounded - jax.lax.stop_gradient(rounded))}
        return Quantized(straight_through(bounded, rounded), terms)

    def quantizer(self, codes: Float[Array | np.ndarray, "V D"] | None = None) -> Quantizer:
        """See `Bottleneck.quantizer`."""
        values = np.arange(self.levels) / (self.levels // 2) - 1
        return Quantizer(tuple((SCALE_LIMIT * values).tolist()), -1.0, 1.0)


def make_bottleneck(name: str, codes: int, levels: int) -> Bottleneck | None:
    """The bottleneck of this name; None for "kl", which has a posterior.

    Args:
      name: one of `BOTTLENECKS`.
      codes: V of vq.
      levels: V of fsq.

    Raises:
      UserError: there is none, or a number is out of range.
    """
    if name not in BOTTLENECKS:
        raise UserError(f"autoencoder bottleneck '{name}' is not one of {', '.join(BOTTLENECKS)}")
    most = np.iinfo(np.uint16).max + 1
    for key, value, limit in (("codes", codes, most), ("levels", levels, MAX_LEVELS)):
        if not 2 <= value <= limit:
            raise UserError(f"autoencoder {key} is {value}, must be 2 to {limit}")
    made = {
        "vq": VectorBottleneck(codes),
        "lfq": SignBottleneck(),
        "fsq": ScalarBottleneck(levels),
    }
    return made.get(name)


BOTTLENECKS = ("kl", "vq", "lfq", "fsq")


def straight_through(
    z: Float[Array, "... D"], quantized: Float[Array, "... D"]
) -> Float[Array, "... D"]:
    """Exactly `quantized`, with the gradient for z."""
    return jax.lax.stop_gradient(quantized) + (z - jax.lax.stop_gradient(z))


def entropy_penalty(z: Float[Array, "... D"]) -> Float[Array, ""]:
    """MAGVIT-2's penalty in nats, E[H(p)] - H(E[p]): certain codes, all of them used equally.

    p is the distribution over the 2^D codes c of a position, proportional to exp(-|z - c|^2). Its
    bits are independent, so its entropy is exact. H(E[p]) is exact for up to `ENTROPY_BITS` bits.
    More are split into groups, whose entropies are added up; that is an upper bound.
    """
    z = z.reshape(-1, z.shape[-1])
    # exp(-(z - 1)^2) / (exp(-(z - 1)^2) + exp(-(z + 1)^2))
    ones, zeros = jax.nn.sigmoid(4 * z), jax.nn.sigmoid(-4 * z)
    of_positions = -(ones * jax.nn.log_sigmoid(4 * z) + zeros * jax.nn.log_sigmoid(-4 * z))
    of_batch = jnp.float32(0)
    groups = -(-z.shape[1] // ENTROPY_BITS)
    for bits in np.array_split(np.arange(z.shape[1]), groups):
        joint = jnp.ones((len(z), 1))
        for bit in bits:
            pair = jnp.stack([zeros[:, bit], ones[:, bit]], axis=1)
            joint = (joint[:, :, None] * pair[:, None]).reshape(len(z), -1)
        mean = jnp.mean(joint, axis=0)
        of_batch -= jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30)))
    return jnp.mean(jnp.sum(of_positions, axis=1)) - of_batch


def code_use(latents: Float[Array, "... D"]) -> dict[str, Float[Array, ""]]:
    """How a batch uses the codes, from q of its positions.

    Returns:
      `codes_used`, the number of different ones; `perplexity`, exp of their entropy in nats: as
      many codes that are used equally often have this entropy.
    """
    flat = latents.reshape(-1, latents.shape[-1])
    count = len(flat)
    in_order = jnp.stack(jax.lax.sort(tuple(flat.T), num_keys=flat.shape[1]), axis=1)
    first = jnp.any(in_order[1:] != in_order[:-1], axis=1)
    run: Int[Array, " N"] = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(first)])
    share = jnp.zeros(count).at[run].add(1) / count
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1)))
    return {"codes_used": run[-1] + 1.0, "perplexity": jnp.exp(entropy)}


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def _mean_square(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.mean(jnp.square(x))
