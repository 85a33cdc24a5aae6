"""Every kind of head: exact probabilities of all outcomes of a position, and draws."""

import dataclasses
import functools
import itertools
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from tiny_model import TINY, head_method, loss_flops, random_params, tiny, tiny_pipeline

from tokenbridge_jax.channels import KL16_CHANNEL_ORDER
from tokenbridge_jax.config import ConfigDict, model_config
from tokenbridge_jax.heads.channel_transformer import tempered_log_prob
from tokenbridge_jax.heads.head import Activations, IndexHead, guided
from tokenbridge_jax.layers import Dense
from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.model_config import HEADS as REGISTERED
from tokenbridge_jax.model_config import SIZES, TokenBridgeConfig
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge.official import export_model

HEADS = {
    "ar": TINY,
    "parallel": tiny(head="parallel"),
    "grouped": tiny(channels_per_group=2),
    "parallel, grouped": tiny(head="parallel", channels_per_group=2),
    "masked": tiny(head="masked", reveal_steps=2),
}
# All 5^4 outcomes of a position, in channel order, and in autoencoder order as heads take them.
OUTCOMES = np.array(list(itertools.product(range(5), repeat=4)), np.int32)
INDICES = OUTCOMES[:, np.argsort(TINY.channel_order)]
FEATURE = np.random.default_rng(5).normal(size=(1, TINY.decoder_width)).astype(np.float32)
DRAWS = 4000


@dataclasses.dataclass(frozen=True)
class Found:
    """The logits and likelihoods that a head gives to all outcomes of one position."""

    logits: np.ndarray
    nll: np.ndarray
    params: dict

    @property
    def log_probs(self) -> np.ndarray:
        """Of the outcomes: [625]."""
        return -self.nll.astype(np.float64).sum(axis=1)


@functools.cache
def exact(kind: str) -> Found:
    config = HEADS[kind]
    params = random_params(config, seed=1, spread=0.2)
    feature = jnp.repeat(FEATURE, len(INDICES), axis=0)
    logits, nll = (head_method(config, m)(params, feature, INDICES) for m in ("logits", "nll"))
    return Found(np.asarray(logits), np.asarray(nll), params)


@functools.cache
def draws(kind: str, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the drawn outcomes, and the log-probabilities that the head returns."""
    feature = jnp.repeat(FEATURE, DRAWS, axis=0)
    keys = jax.random.split(jax.random.key(3), DRAWS)
    sample = head_method(HEADS[kind], "sample")
    drawn, log_probs = sample(exact(kind).params, feature, keys, jnp.float32(temperature))
    in_order = np.asarray(drawn)[:, TINY.channel_order]
    return np.ravel_multi_index(tuple(in_order.T), (5,) * 4), np.asarray(log_probs)


@pytest.mark.parametrize("kind", HEADS)
def test_probabilities_of_a_position_sum_to_one(kind: str):
    found = exact(kind)
    assert found.logits.shape == (625, 4, 5)
    assert found.nll.shape == (625, 4)
    assert np.exp(found.log_probs).sum() == pytest.approx(1, abs=1e-5)
    # The likelihoods follow from the logits, which are in channel order.
    expected = special.log_softmax(found.logits.astype(np.float64), axis=-1)
    expected = np.take_along_axis(expected, OUTCOMES[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(-found.nll[:, TINY.channel_order], expected, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_a_place_sees_the_places_before_it_or_none(kind: str):
    """The logits of place c differ between outcomes if and only if a channel it sees differs."""
    logits = exact(kind).logits.reshape(5, 5, 5, 5, 4, 5)
    for place in range(4):
        group = place // 2 * 2
        seen = {
            "ar": range(place),
            "parallel": range(0),
            "grouped": range(place),
            "parallel, grouped": range(group, place),
            "masked": range(group),
        }[kind]
        of_place = logits[..., place, :]
        unseen = tuple(axis for axis in range(4) if axis not in seen)
        spread = np.ptp(of_place, axis=unseen)
        assert spread.max() < 1e-5
        for axis in seen:
            assert np.ptp(of_place, axis=axis).min() > 1e-4


@pytest.mark.parametrize("kind", ["grouped", "parallel, grouped"])
def test_channels_of_a_group_are_marginals_of_its_classes(kind: str):
    """Sums of the joint head's probabilities, with classes as numbers in base V."""
    config, found = HEADS[kind], exact(kind)
    joint = config.joint_classes
    assert (joint, config.groups) == (25, 2)
    classes = jnp.asarray(OUTCOMES[:, 0::2] * 5 + OUTCOMES[:, 1::2])
    logits = TokenBridge(config).apply(
        {"params": found.params},
        method=lambda model: model.head.joint.logits(
            jnp.repeat(FEATURE, len(classes), axis=0), classes
        ),
    )
    assert logits.shape == (625, 2, 25)
    p = special.softmax(np.asarray(logits, np.float64), axis=-1).reshape(625, 2, 5, 5)
    first = p.sum(axis=3)
    second = p / first[..., None]
    second = np.take_along_axis(second, OUTCOMES[:, 0::2, None, None], axis=2)[:, :, 0]
    expected = np.stack([first, second], axis=2).reshape(625, 4, 5)
    np.testing.assert_allclose(special.softmax(found.logits, axis=-1), expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("kind", HEADS)
def test_draws_have_the_exact_probabilities(kind: str, temperature: float):
    found, (drawn, log_probs) = exact(kind), draws(kind, temperature)
    expected = found.log_probs if temperature == 1 else _tempered(kind, temperature)
    np.testing.assert_allclose(log_probs, expected[drawn], atol=1e-4)
    p = np.exp(expected)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    # Rare outcomes share bins, so that every bin is expected often enough.
    rank = np.argsort(-p)
    bins = np.empty(625, int)
    bins[rank] = np.minimum(np.cumsum(p[rank]) * 40, 39).astype(int)
    counts, chances = np.bincount(bins[drawn], minlength=40), np.bincount(bins, p, minlength=40)
    some = chances > 0
    assert stats.chisquare(counts[some], chances[some] / p.sum() * DRAWS).pvalue > 1e-3
    # The test is able to detect another temperature.
    other = np.bincount(bins, special.softmax(1.3 * expected), minlength=40)
    assert stats.chisquare(counts[some], other[some] * DRAWS).pvalue < 1e-4


def _tempered(kind: str, temperature: float) -> np.ndarray:
    """Log-probabilities of the outcomes if the temperature applies to the classes of a group."""
    config, found = HEADS[kind], exact(kind)
    log_p = special.log_softmax(found.logits.astype(np.float64), axis=-1)
    total = np.zeros(625)
    for group in range(config.groups):
        size = config.channels_per_group
        places = range(group * size, (group + 1) * size)
        chosen = sum(log_p[np.arange(625), place, OUTCOMES[:, place]] for place in places)
        # Normalise over the group's classes among outcomes with the same earlier channels.
        scaled = chosen / temperature
        before = [tuple(row) for row in OUTCOMES[:, : places[0]]]
        own = [tuple(row) for row in OUTCOMES[:, places[0] : places[-1] + 1]]
        sums: dict = {}
        for key, cls, value in zip(before, own, scaled, strict=True):
            sums.setdefault(key, {})[cls] = value
        norms = {key: special.logsumexp(list(values.values())) for key, values in sums.items()}
        total += scaled - np.array([norms[key] for key in before])
    return total


@pytest.mark.parametrize("kind", HEADS)
def test_temperature_0_takes_the_most_likely_class_of_every_group(kind: str):
    drawn, log_probs = draws(kind, 0.0)
    assert len(set(drawn)) == 1
    found, size = exact(kind), HEADS[kind].channels_per_group
    log_p = special.log_softmax(found.logits.astype(np.float64), axis=-1)
    chosen = np.take_along_axis(log_p, OUTCOMES[..., None], axis=-1)[..., 0]
    alive = np.ones(625, bool)
    for start in range(0, 4, size):
        value = chosen[:, start : start + size].sum(axis=1)
        alive &= value > value[alive].max() - 1e-9
    assert alive[drawn[0]]
    np.testing.assert_allclose(log_probs, found.log_probs[drawn[0]], atol=1e-4)


# --- In the model ---------------------------------------------------------------------------------


def test_images_and_likelihoods_on_a_mesh():
    """Confidence order and `log_probs` are equal on one device and on a 2 x 2 x 2 mesh."""
    config = HEADS["parallel, grouped"]
    params = random_params(config, seed=1, spread=0.2)
    one = tiny_pipeline(config, params)
    many = tiny_pipeline(config, params, meshes.make_mesh(2, 2, 2))
    settings = dict(num_iter=2, guidance=1.0, order="confidence")
    classes = [0, 1, 2, 0]
    images = one.generate_indices(classes, **settings)
    np.testing.assert_array_equal(many.generate_indices(classes, **settings), images)
    expected = one.log_probs(images, classes)
    np.testing.assert_allclose(many.log_probs(images, classes), expected, atol=5e-5)
    assert (expected < 0).all()


def test_forward_flops_are_those_of_the_program():
    sizes = dict(encoder_layers=2, head_layers=3, head_width=32)
    config = dataclasses.replace(HEADS["parallel, grouped"], **sizes)
    assert loss_flops(config, 5)[0] == config.forward_flops(5)


def test_groups_have_the_published_numbers_of_parameters():
    """60M, 63M and 530M, with 16 levels and three layers."""
    sizes = SIZES["L"] | dict(head_layers=3)
    counts = []
    for group in (1, 2, 4):
        config = TokenBridgeConfig(
            Quantizer.gaussian(16), KL16_CHANNEL_ORDER, **sizes, channels_per_group=group
        )
        shapes = abstract_params(config)["head"]
        counts.append(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
    assert [count // 10**6 for count in counts] == [60, 63, 529]


def test_the_parallel_head_only_lacks_the_tables_of_previous_indices():
    trees = [abstract_params(HEADS[kind])["head"] for kind in ("ar", "parallel")]
    assert trees[0].pop("token_embeddings").shape == (3, 5, 16)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, *trees))


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "gan"}, r"model\.head='gan' is not one of channel_ar, parallel, masked, diff"),
        (
            {"head": "diffusion"},
            r"model\.head='diffusion' needs latents, not indices; tokenize the",
        ),
        ({"channels_per_group": 3}, r"channels_per_group=3 must divide 4 channels into groups"),
        ({"channels_per_group": 4}, r"one channel or group after another, but there is only one"),
        ({"channels_per_group": 0}, r"model\.channels_per_group=0 must be at least 1"),
        (
            {"quantizer": Quantizer.gaussian(300), "channels_per_group": 2},
            r"channels_per_group=2 of 300 levels makes 90000 joint classes, more than 65536",
        ),
        ({"head": "parallel", "first_token_quirk": True}, "first_token_quirk is for imported"),
        (
            {"head": "masked", "channels_per_group": 2},
            r"model\.head='masked' has no groups of channels; set model\.channels_per_group=1",
        ),
        (
            {"head": "masked", "reveal_steps": 5},
            r"number of channels, 4; set model\.reveal_steps=4 or less",
        ),
        ({"head": "masked", "reveal_order": "any"}, r"'any' is not one of fixed, confidence"),
    ],
)
def test_impossible_heads_are_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("kind", list(HEADS)[1:])
def test_configs_survive_json_and_only_the_published_head_is_exported(kind: str):
    config = HEADS[kind]
    assert TokenBridgeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(UserError, match=r"PyTorch files hold model\.head='channel_ar' with one"):
        export_model(config, exact(kind).params)


def test_channel_orders_that_the_head_may_choose():
    config = ConfigDict({"data": {"num_classes": 3}, "model": {}})
    make = lambda: model_config(config, TINY.quantizer, (2, 0, 3, 1), 8)  # noqa: E731
    assert make().channel_order == (2, 0, 3, 1)
    for rule, order in [
        ("tokens", (2, 0, 3, 1)),
        ("reverse", (1, 3, 0, 2)),
        ("identity", (0, 1, 2, 3)),
    ]:
        config.model.channel_order = rule
        assert make().channel_order == order
    config.model.channel_order = "backwards"
    with pytest.raises(UserError, match="'backwards' is not one of tokens, reverse, identity"):
        make()


class IndependentHead(IndexHead):
    """A new head, with no more than `IndexHead` asks for: one layer, channels independent."""

    float32_params: ClassVar = ("proj",)

    @classmethod
    def from_config(cls, config, channel_order, levels):
        return cls(channel_order, levels)

    @classmethod
    def summary(cls, config):
        return "one layer"

    @classmethod
    def position_flops(cls, config):
        return 2 * config.decoder_width * config.groups * config.joint_classes

    @classmethod
    def activations(cls, config):
        return Activations(hidden=0, outputs=config.groups * config.joint_classes)

    def setup(self):
        self.proj = Dense((len(self.channel_order), self.levels), ("embed", None, None))

    def logits(self, feature, indices, as_sampled=False):
        return self.proj(feature)

    def sample(self, feature, keys, temperature, guidance=None):
        logits = self.proj(guided(feature, guidance))
        drawn = jax.vmap(jax.random.categorical)(keys, logits / temperature)
        log_probs = jnp.sum(tempered_log_prob(logits, drawn, temperature), axis=1)
        return drawn[:, np.argsort(self.channel_order)], log_probs


@pytest.mark.parametrize("group", [1, 2])
def test_a_new_head_needs_no_more_than_its_interface_says(monkeypatch, group):
    monkeypatch.setitem(REGISTERED, "independent", IndependentHead)
    config = tiny(head="independent", channels_per_group=group)
    assert loss_flops(config, 5)[0] == config.forward_flops(5)
    assert config.head_activations.outputs == {1: 4 * 5, 2: 2 * 25}[group]
    params = random_params(config, spread=0.2)
    feature = jnp.repeat(FEATURE, len(INDICES), axis=0)
    nll = np.asarray(head_method(config, "nll")(params, feature, INDICES), np.float64).sum(axis=1)
    assert np.exp(-nll).sum() == pytest.approx(1, abs=1e-5)
    keys = jax.random.split(jax.random.key(3), len(feature))
    drawn, log_probs = head_method(config, "sample")(params, feature, keys, jnp.float32(1))
    in_order = np.asarray(drawn)[:, TINY.channel_order]
    numbers = np.ravel_multi_index(tuple(in_order.T), (5,) * 4)
    np.testing.assert_allclose(log_probs, -nll[numbers], atol=1e-4)
    # The first channel of the order is drawn as often as it should be.
    expected = np.exp(-nll).reshape(5, -1).sum(axis=1)
    found = np.bincount(in_order[:, 0], minlength=5)
    assert stats.chisquare(found, expected / expected.sum() * found.sum()).pvalue > 1e-3
    pipeline = tiny_pipeline(config, params)
    drawn = pipeline.generate_indices([0, 1], num_iter=2, guidance=2.0)
    assert drawn.shape == (2, config.positions, config.channels)
