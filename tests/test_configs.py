"""Every config builds; arguments and overrides are checked."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import pytest

from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.channels import resolve_channel_order
from tokenbridge_jax.commands.runner import SECTIONS
from tokenbridge_jax.commands.train_vae import make_task
from tokenbridge_jax.config import parse_arg
from tokenbridge_jax.data.tokenizing import make_quantizer
from tokenbridge_jax.model import TokenBridgeConfig, abstract_params
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.sampler import SamplingSettings
from tokenbridge_jax.training.optimizer import OptimizerConfig

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE = ("width", "layers", "heads")
ARGUMENTS = {
    "ablations": ["group_4", "head_parallel,on=digits"],
    "digits": [None, "quick"],
    "imagenet256": [None, "size=B", "size=H,tfds", "size=L,quick"],
}
# Keys of `config.model` that describe the network; the others are about training it.
KEYS = {
    *(f"{part}_{size}" for part in ("encoder", "decoder", "head") for size in SIZE),
    *(
        "head",
        "channels_per_group",
        "buffer",
        "dropout",
        "dtype",
        "remat",
        "scan_layers",
        "head_chunk",
    ),
}
PARAMETERS = {
    ("imagenet256", "size=B"): 218_024_704,
    ("imagenet256", None): 486_889_472,
    ("imagenet256", "size=H,tfds"): 910_040_576,
}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name, args in ARGUMENTS.items() for arg in args]
)
def test_every_config_makes_everything_it_describes(name, arg):
    config = load(name).get_config(arg)
    assert set(config) == set(SECTIONS)
    autoencoder = make_task(config).module.config
    quantizer = make_quantizer(config)
    order = resolve_channel_order(
        "identity" if config.quantizer.channel_order == "frequency" else "kl16",
        autoencoder.latent_channels,
    )
    model = TokenBridgeConfig(
        quantizer=quantizer,
        channel_order=order,
        positions=autoencoder.positions,
        classes=config.data.num_classes,
        **{key: config.model[key] for key in KEYS},
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    if (name, arg) in PARAMETERS:
        assert parameters == PARAMETERS[name, arg]
    for section in ("vae_training", "training"):
        recipe = OptimizerConfig.from_section(config[section], 625, section)
        assert recipe.warmup_steps < recipe.total_steps
    assert config.sampling.batch_size > 0
    SamplingSettings.from_section(config.sampling)


def test_the_paper_trains_for_800_epochs():
    section = load("imagenet256").get_config().training
    recipe = OptimizerConfig.from_section(section, 1_281_167 // 2048, "training")
    assert (recipe.total_steps, recipe.warmup_steps) == (500_000, 125_000)


@pytest.mark.parametrize(("on", "scale"), [("imagenet256", 1), ("digits", 2)])
def test_every_ablation_makes_a_model(on: str, scale: int):
    ablations = load("ablations")
    made = {}
    for name in ablations.ROWS:
        config = ablations.get_config(f"{name},on={on}")
        made[name] = make_model(config)
    base = made["head_channel_ar"]
    assert base.channel_order == tuple(range(base.channels))
    for same in ("order_normal", "levels_64", "head_1024x6"):
        assert made[same] == base
    changed = {
        "head_parallel": dict(head="parallel"),
        "levels_16": dict(quantizer=Quantizer.gaussian(16 // scale, base.quantizer.maximum)),
        "head_512x4": dict(head_width=512 if scale == 1 else 32, head_layers=5 - scale),
    }
    for name, changes in changed.items():
        assert made[name] == dataclasses.replace(base, **changes)
    assert made["order_reverse"].channel_order == made["order_frequency"].channel_order[::-1]
    assert [made[f"group_{g}"].groups * g for g in (1, 2, 4)] == [base.channels] * 3
    assert made["group_4"].joint_classes == (16 // scale) ** 4


def test_unknown_arguments_are_refused():
    with pytest.raises(UserError, match="no argument 'sizes'; it takes quick, size"):
        parse_arg("sizes=L", size="L", quick=False)
    with pytest.raises(UserError, match="steps=many is not a int"):
        parse_arg("steps=many", steps=3)
    with pytest.raises(UserError, match="quick=maybe must be true or false"):
        parse_arg("quick=maybe", quick=False)
    with pytest.raises(UserError, match="size=XL is not one of B, L, H"):
        load("imagenet256").get_config("size=XL")
    for arg in (None, "head", "on=digits"):
        with pytest.raises(
            UserError, match=r"there is no ablation '.*'; its name comes first .* head_channel_ar"
        ):
            load("ablations").get_config(arg)
    with pytest.raises(UserError, match="on=mnist is not one of imagenet256, digits"):
        load("ablations").get_config("group_2,on=mnist")


def test_arguments_take_the_type_of_their_default():
    parsed = parse_arg("steps=5,rate=1e-3,quick", steps=1, rate=0.5, quick=False, name="x")
    assert parsed.to_dict() == {"steps": 5, "rate": 1e-3, "quick": True, "name": "x"}
