"""The model's sizes: published counts and names, refused values, initial values, FLOPs."""

import collections
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util
from scipy import stats
from tiny_model import leaf_names, loss_flops, tiny

from tokenbridge_jax.channels import KL16_CHANNEL_ORDER
from tokenbridge_jax.model import abstract_params, init_params
from tokenbridge_jax.model_config import SIZES, TokenBridgeConfig
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge.official import BUFFERS, table

OFFICIAL = json.loads(
    (Path(__file__).parent / "goldens" / "official_state_dict_shapes.json").read_text()
)


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "name", "published"),
    [("B", "base", 218_024_704), ("L", "large", 486_889_472), ("H", "huge", 910_040_576)],
)
def test_published_sizes(size: str, name: str, published: int):
    """Parameter counts are the published ones, and the table has every official name and shape."""
    quantizer = Quantizer.gaussian(64)
    config = TokenBridgeConfig(quantizer, KL16_CHANNEL_ORDER, **SIZES[size])
    leaves = traverse_util.flatten_dict(abstract_params(config), sep=".")
    assert sum(leaf.size for leaf in leaves.values()) == published
    assert OFFICIAL[f"tokenbridge_{name}:parameters"] == published

    official = {k: tuple(v) for k, v in OFFICIAL[f"tokenbridge_{name}"].items()}
    entries = table(config)
    ours = {e.torch_name: e.expected_shape(leaves[e.path].shape) for e in entries}
    assert len(ours) == len(entries), "a name twice"
    assert ours == {k: v for k, v in official.items() if k not in BUFFERS}
    assert official["boundaries"] == quantizer.boundaries().shape
    assert official["reconstruction_values"] == (quantizer.levels,)

    # Every number of every leaf has exactly one place in the state dict.
    covered: collections.Counter = collections.Counter()
    for entry in entries:
        covered[entry.path] += math.prod(ours[entry.torch_name])
    assert covered == {path: leaf.size for path, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("remat", "some", r"model\.remat='some' is not one of none, dots, full"),
        ("dtype", "bfloat17", r"model\.dtype='bfloat17' is not one of float32, bfloat16"),
        ("head_width", 18, r"model\.head_width=18 does not divide into head_heads=4"),
        ("encoder_heads", 3, r"model\.encoder_width=16 does not divide into encoder_heads=3"),
        ("decoder_heads", 0, r"model\.decoder_heads=0 must be at least 1"),
        ("head_layers", 0, r"model\.head_layers=0 must be at least 1"),
        ("buffer", 0, r"model\.buffer=0 must be at least 1"),
        ("head_chunk", 0, r"model\.head_chunk=0 must be at least 1"),
        ("dropout", 1.0, r"model\.dropout=1\.0 must be at least 0 and below 1"),
        ("dropout", -0.1, r"model\.dropout=-0\.1 must be at least 0 and below 1"),
    ],
)
def test_impossible_sizes_are_named(field: str, value, message: str):
    with pytest.raises(UserError, match=message):
        tiny(**{field: value})


def test_config_survives_json():
    config = tiny(dtype="bfloat16", remat="dots", first_token_quirk=True, scan_layers=False)
    assert TokenBridgeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


# --- Initialisation -------------------------------------------------------------------------------


def _uniform(fan_in: int, fan_out: int):
    bound = math.sqrt(6 / (fan_in + fan_out))
    return stats.uniform(-bound, 2 * bound)


def _random_in_block(width: int) -> dict[str, Any]:
    return {
        "attn/qkv/kernel": _uniform(width, 3 * width),  # One matrix, not three.
        "attn/proj/kernel": _uniform(width, width),
        "mlp/fc1/kernel": _uniform(width, 4 * width),
        "mlp/fc2/kernel": _uniform(4 * width, width),
    }


def test_every_parameter_starts_from_its_published_distribution():
    """A Kolmogorov-Smirnov test for random leaves; scales are 1, biases and modulations 0."""
    config = tiny(
        encoder_width=64, decoder_width=96, head_width=48, head_layers=2, encoder_layers=2,
        classes=20, positions=16,
    )  # fmt: skip
    encoder, decoder, head = config.encoder_width, config.decoder_width, config.head_width
    small = stats.norm(0, 0.02)
    random = {
        "backbone/class_embedding": small,
        "backbone/null_latent": small,
        "backbone/encoder_position": small,
        "backbone/mask_token": small,
        "backbone/decoder_position": small,
        "backbone/output_position": small,
        "backbone/z_proj/kernel": _uniform(config.channels, encoder),
        "backbone/decoder_embed/kernel": _uniform(encoder, decoder),
        "head/condition_proj/kernel": _uniform(decoder, head),
        "head/token_embeddings": stats.norm(0, 1),
        "head/channel_embed": small,
        "head/timestep_embed": small,
        "head/classifier/kernel": _uniform(head, config.levels),
    }
    stacks = {"backbone/encoder_blocks": encoder, "backbone/decoder_blocks": decoder}
    for stack, width in (stacks | {"head/blocks": head}).items():
        random |= {f"{stack}/{name}": value for name, value in _random_in_block(width).items()}

    params = jax.jit(lambda: nn.unbox(init_params(config, jax.random.key(0))))()
    leaves = leaf_names(params)
    assert random.keys() <= leaves.keys()
    firsts = collections.Counter(leaf.flat[0] for leaf in leaves.values())
    for name, leaf in leaves.items():
        assert leaf.dtype == np.float32
        if name not in random:
            assert name.endswith(("/scale", "/bias", "modulation/kernel")), name
            assert (leaf == name.endswith("/scale")).all(), name
            continue
        expected = random[name]
        assert firsts[leaf.flat[0]] == 1, f"{name} has another leaf's numbers"
        low, high = expected.support()
        assert low <= leaf.min() <= leaf.max() <= high, name
        sample = np.random.default_rng(0).permutation(leaf.ravel())[:5000]
        assert stats.kstest(sample, expected.cdf).pvalue > 1e-3, name
        # Each layer, channel or row of a stack is drawn from the whole distribution.
        if len(leaf) > 1:
            assert len(np.unique(leaf.reshape(len(leaf), -1)[:, 0])) == len(leaf), name
        if leaf.ndim > 2 and leaf[0].size > 200:
            for part in leaf if "blocks" in name or "head" in name else ():
                assert stats.kstest(part.ravel(), expected.cdf).pvalue > 1e-3, name


# --- Cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "scored"), [(3, None), (8, None), (8, 2)])
def test_forward_flops_equal_those_of_the_program(hidden: int, scored: int | None):
    """Exactly, for depths and widths that are all different."""
    config = tiny(encoder_layers=2, decoder_layers=3, head_layers=4, head_width=32, buffer=5)
    fraction = 1.0 if scored is None else scored / hidden
    flops = {
        loss_flops(dataclasses.replace(config, scan_layers=scan_layers), hidden, fraction)[0]
        for scan_layers in (True, False)
    }
    assert flops == {config.forward_flops(hidden, scored)}


def test_forward_flops_equal_xlas_count():
    """With one layer each, because XLA counts a loop's body once. XLA adds elementwise work."""
    config = tiny(
        quantizer=Quantizer.gaussian(64), channel_order=KL16_CHANNEL_ORDER, positions=64, buffer=16,
        encoder_width=256, decoder_width=320, head_width=192,
    )  # fmt: skip
    flops, lowered = loss_flops(config, 48)
    assert config.forward_flops(48) == flops
    assert 1.0 < lowered.cost_analysis()["flops"] / flops < 1.05
