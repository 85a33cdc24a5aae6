"""What every head of latents gives the rest of the package."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiny_model import (
    head_method,
    loss_flops,
    program_flops,
    random_params,
    relative_error,
    tiny,
    tiny_pipeline,
)

from tokenbridge_jax.flops import head_flops
from tokenbridge_jax.heads.conditioned_mlp import SINUSOIDS
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.model_config import HEADS as REGISTERED
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge.official import export_model

LATENTS = dict(quantizer=Unquantized(), channel_order=(0, 1, 2, 3), positions=16)
HEADS = {
    "mixture": tiny(head="mixture", head_components=3, head_proposals=8, **LATENTS),
    "flow": tiny(head="flow", head_layers=2, head_steps=3, head_draws=2, **LATENTS),
}
CARDS = {"mixture": "3 components", "flow": "2 blocks of width 16, 3 steps of heun"}


@pytest.mark.parametrize("kind", HEADS)
def test_flops_of_the_loss_are_those_of_the_program(kind):
    config = dataclasses.replace(HEADS[kind], encoder_layers=2, head_width=32, head_layers=3)
    assert loss_flops(config, 5)[0] == config.forward_flops(5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("kind", HEADS)
def test_flops_of_drawing_are_those_of_the_program(kind, branches, solver):
    """Without the embeddings of the times, which all positions share."""
    config = dataclasses.replace(HEADS[kind], head_width=32, head_solver=solver)
    feature = jnp.zeros((6, config.decoder_width))
    guidance = Guidance(feature, jnp.float32(2)) if branches == 2 else None
    keys = jax.random.split(jax.random.key(0), 6)

    def draw(params):
        return TokenBridge(config).apply(
            {"params": params},
            method=lambda model: model.head.sample(feature, keys, jnp.float32(1), guidance)[0],
        )

    found = program_flops(jax.make_jaxpr(draw)(abstract_params(config)).jaxpr)
    times = (config.head_steps + 1) * 2 * 32 * (SINUSOIDS + 32) if kind == "flow" else 0
    assert found == 6 * head_flops(config, branches) + times


@pytest.mark.parametrize("kind", HEADS)
def test_images_and_edits(kind, tmp_path):
    """A mesh changes rounding only. Confidence order compares densities of drawn positions."""
    config = HEADS[kind]
    params = random_params(config, spread=0.1)
    one = tiny_pipeline(config, params)
    many = tiny_pipeline(config, params, meshes.make_mesh(2, 2, 2))
    order = "confidence" if kind == "mixture" else "random"
    settings = dict(num_iter=2, guidance=2.0, order=order)
    drawn = one.generate_indices([0, 1, 2, 0], **settings)
    assert np.isfinite(drawn).all()
    assert relative_error(many.generate_indices([0, 1, 2, 0], **settings), drawn) < 1e-4
    images = one.decode(drawn)
    edited = one.edit(images, np.eye(8, dtype=bool), 1, **settings)
    assert edited.shape == images.shape

    one.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"| head | {kind}, {CARDS[kind]} |" in card


def test_heads_without_a_density_say_so():
    config = HEADS["flow"]
    pipeline = tiny_pipeline(config, random_params(config))
    with pytest.raises(UserError, match=r"order='confidence' needs probabilities, which model\.he"):
        pipeline.generate([0], order="confidence")
    with pytest.raises(UserError, match="this model's head gives no probabilities"):
        pipeline.log_probs(np.zeros((1, 16, 4), np.float32), [0])


@pytest.mark.parametrize("kind", HEADS)
def test_configs_survive_json_and_refuse_what_makes_no_sense(kind):
    config = HEADS[kind]
    assert TokenBridgeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    for changes, message in (
        ({"channels_per_group": 2}, f"'{kind}' has no groups of channels"),
        ({"first_token_quirk": True}, "first_token_quirk is for imported"),
        ({"head_components": 0}, r"model\.head_components=0 must be at least 1"),
        ({"head_proposals": 0}, r"model\.head_proposals=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, **changes)
    with pytest.raises(UserError, match=f"PyTorch files hold .* this model has head='{kind}'"):
        export_model(config, {})


def test_the_example_of_contributing(tmp_path, monkeypatch):
    """It is a head that a model can have, and its density is that of its draws."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (tmp_path / "normal.py").write_text(text.split("```python\n")[1].split("```")[0])
    head = runpy.run_path(str(tmp_path / "normal.py"))["NormalHead"]
    monkeypatch.setitem(REGISTERED, "normal", head)
    config = tiny(head="normal", **LATENTS)
    assert loss_flops(config, 5)[0] == config.forward_flops(5)
    params = random_params(config, spread=0.1)
    feature = jnp.ones((2000, config.decoder_width))
    keys = jax.random.split(jax.random.key(0), len(feature))
    drawn, log_probs = head_method(config, "sample")(params, feature, keys, jnp.float32(1))
    projected = np.asarray(feature[0] @ params["head"]["proj"]["kernel"])
    mean, log_deviation = np.split(projected + np.asarray(params["head"]["proj"]["bias"]), 2)
    standard = (np.asarray(drawn) - mean) / np.exp(log_deviation)
    assert stats.kstest(standard.ravel(), "norm").pvalue > 1e-3
    expected = stats.norm.logpdf(drawn, mean, np.exp(log_deviation)).sum(axis=1)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-4)
    pipeline = tiny_pipeline(config, params)
    assert np.isfinite(pipeline.generate_indices([0, 1], num_iter=2, guidance=2.0)).all()
