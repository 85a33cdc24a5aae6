"""Experiments and their arguments, typed parts of a config, checks of values, the wheel."""

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from tokenbridge_jax import config as configs
from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.commands.train_vae import make_task
from tokenbridge_jax.config import check_ranges, check_training, optimizer_config, parse_arg
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
ARGUMENTS = {
    "ablations": ["group_4", "head_parallel,on=digits"],
    "base": [None],
    "cifar10": [None, "size=B,tfds", "size=S,quick"],
    "digits": [None, "quick"],
    "imagenet256": [None, "size=B", "size=H,tfds", "size=L,quick"],
    "mar256": [None, "size=B", "size=H"],
}
PARAMETERS = {
    ("cifar10", None): 25_505_664,
    ("cifar10", "size=B,tfds"): 215_741_568,
    ("imagenet256", "size=B"): 218_024_704,
    ("mar256", None): 478_326_304,
    ("mar256", "size=B"): 207_924_768,
    ("mar256", "size=H"): 942_403_104,
    ("imagenet256", None): 486_889_472,
    ("imagenet256", "size=H,tfds"): 910_040_576,
}


def load(name: str):
    return importlib.import_module(f"configs.{name}")


# --- Experiments ----------------------------------------------------------------------------------


def test_every_file_is_tested():
    assert set(configs.experiments()) == {path.stem for path in CONFIGS.glob("*.py")}
    assert set(configs.experiments()) == set(ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name, args in ARGUMENTS.items() for arg in args]
)
def test_every_config_makes_everything_it_describes(name, arg):
    config = load(name).get_config(arg)
    configs.check_config(config)
    assert make_task(config).module.config.latent_channels == config.autoencoder.latent_channels
    model = make_model(config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    assert parameters == PARAMETERS.get((name, arg), parameters)
    for section in ("vae_training", "training") if name != "base" else ():  # It has no lengths.
        check_ranges(config, section)
        recipe = configs.recipe(config, section, 1_281_167)
        assert recipe.optimizer.warmup_steps < recipe.optimizer.total_steps
    assert configs.mask_sampler(config, model.positions).fewest_hidden < model.positions
    assert config.sampling.batch_size > 0
    configs.sampling_settings(config.sampling)


@pytest.mark.parametrize("name", ["training", "vae_training"])
def test_a_key_without_value_is_named(name: str):
    config, mesh = load("digits").get_config(), meshes.make_mesh()
    configs.check_training(config, name, mesh)
    config[name].learning_rate = None
    with pytest.raises(UserError, match=f"no value {name}.learning_rate; configs/base"):
        configs.check_training(config, name, mesh)
    with config.unlocked():
        del config[name].accumulation, config[name].learning_rate
    with pytest.raises(UserError, match=f"no value {name}.(accumulation|learning_rate); configs"):
        configs.check_training(config, name, mesh)


def test_the_paper_trains_for_800_epochs():
    optimizer = configs.recipe(load("imagenet256").get_config(), "training", 1_281_167).optimizer
    assert (optimizer.total_steps, optimizer.warmup_steps) == (500_000, 125_000)


def test_mars_recipe():
    """400 epochs of 2048 images, a quarter of them warm-up; no decay of the head; 4 noises."""
    config = load("mar256").get_config()
    optimizer = configs.recipe(config, "training", 1_281_167).optimizer
    assert (optimizer.total_steps, optimizer.warmup_steps) == (250_000, 62_500)
    assert (optimizer.schedule, optimizer.learning_rate) == ("constant", 8e-4)
    assert (optimizer.weight_decay, optimizer.decay_head, optimizer.clip) == (0.02, False, 3.0)
    assert (config.tokenize.store, make_model(config).head_draws) == ("latents", 4)


@pytest.mark.parametrize(("on", "scale"), [("imagenet256", 1), ("digits", 2)])
def test_every_ablation_makes_a_model(on: str, scale: int):
    ablations = load("ablations")
    made = {name: make_model(ablations.get_config(f"{name},on={on}")) for name in ablations.ROWS}
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
    unknown = r"there is no ablation '.*'; its name comes first .* head_channel_ar"
    for arg in (None, "head", "on=digits"):
        with pytest.raises(UserError, match=unknown):
            load("ablations").get_config(arg)
    with pytest.raises(UserError, match="on=mnist is not one of imagenet256, digits"):
        load("ablations").get_config("group_2,on=mnist")


def test_arguments_take_the_type_of_their_default():
    parsed = parse_arg("steps=5,rate=1e-3,quick", steps=1, rate=0.5, quick=False, name="x")
    assert parsed.to_dict() == {"steps": 5, "rate": 1e-3, "quick": True, "name": "x"}


def test_an_experiment_adds_no_keys():
    with pytest.raises(KeyError):
        configs.experiment("base").training.update(stepz=3)


def test_an_installed_wheel_has_types_and_experiments(tmp_path):
    """It is built from a copy, unpacked, and run in a folder without the checkout."""
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    source.mkdir()
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("configs", "tokenbridge_jax"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    assert (unpacked / "tokenbridge_jax" / "py.typed").exists()
    shutil.rmtree(source)

    tokenbridge = "import sys; from tokenbridge_jax.commands.runner import main; sys.exit(main())"
    for experiment, message in (
        ("digits:quick", "workdir w does not exist; check --workdir"),
        ("digit:quick", "no experiment 'digit'; the built-in ones are ablations, base, cifar10, "),
    ):
        command = [sys.executable, "-c", tokenbridge, "train", f"--config={experiment}"]
        found = subprocess.run(
            [*command, "--workdir=w"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(unpacked)},
            capture_output=True,
            text=True,
        )
        assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
        assert message in found.stderr


# --- Checks and typed parts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *((key, 0, "at least 1") for key in ("batch_size", "accumulation", "keep", "log_every")),
        ("checkpoint_every", -1, "at least 1"),
        ("hidden_bucket", 0, "at least 1"),
        *(("head_fraction", value, "above 0 and at most 1") for value in (0.0, 1.01, -0.5)),
        ("eval_every", -1, r"0 \(never\) or more"),
        ("sample_every", -5, r"0 \(never\) or more"),
        *((key, -1.0, "0 or more") for key in ("clip", "weight_decay", "kl_weight", "epochs")),
        ("learning_rate", -1e-3, "0 or more"),
        ("learning_rate", float("inf"), "a finite number"),
        ("learning_rate", float("nan"), "a finite number"),
        *((key, 1.0, "below 1") for key in ("ema_decay", "beta1", "beta2", "class_dropout")),
        ("ema_decay", -0.1, "0 or more"),
        ("schedule", "linear", "cosine or constant"),
        ("reconstruction", "l3", "l1 or l2"),
        ("dtype", "float99", "float32 or bfloat16"),
        ("dtype", "int8", "float32 or bfloat16"),
        ("epochs", "many", "a finite number"),  # A key without a default has no type.
    ],
)
def test_values_that_make_no_sense_are_named(key, value, message):
    config = ConfigDict({"training": {"steps": 3, key: value}})
    with pytest.raises(UserError, match=rf"^training\.{key} is {value}; it must be .*{message}"):
        check_ranges(config, "training")


def test_values_at_the_limits_are_accepted():
    section = dict(batch_size=8, clip=0.0, ema_decay=0.0, eval_every=0, epochs=None, keep=1)
    config = with_lengths(**section, head_fraction=1.0, accumulation=1)
    check_training(config, "training", meshes.make_mesh(2, 2, 2))


def test_a_batch_that_does_not_divide_is_refused():
    config = with_lengths(batch_size=12, accumulation=2)
    with pytest.raises(UserError, match=r"^training.batch_size 12 .* multiple of 8"):
        check_training(config, "training", meshes.make_mesh(2, 2, 2))


def with_lengths(**values) -> ConfigDict:
    config = load("digits").get_config()
    config.training.update(steps=None, warmup_steps=None, clip=3)
    config.training.update(values)
    return config


@pytest.mark.parametrize(
    ("values", "lengths"),
    [
        (dict(epochs=8.0, warmup_epochs=0.5), (80, 5, "cosine")),
        (dict(steps=7, epochs=8.0, schedule="constant"), (7, 0, "constant")),
    ],
)
def test_lengths_in_steps_or_epochs(values, lengths):
    found = optimizer_config(with_lengths(**values), "training", 10)
    assert (found.total_steps, found.warmup_steps, found.schedule) == lengths
    assert (found.clip, type(found.clip)) == (3.0, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(), "neither training.steps nor training.epochs"),
        (dict(steps=0), "has 0 steps; set training.steps"),
        (dict(steps=4, warmup_steps=5), "warm-up of 5 steps"),
    ],
)
def test_impossible_recipes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        optimizer_config(with_lengths(**values), "training", 10)


def test_flat_fields_are_json():
    config = ConfigDict({"seed": 1, "model": {"width": 8, "order": (1, 0)}, "x": 2})
    assert configs.flat_fields(config, ["seed", "model"]) == {
        "seed": 1,
        "model.width": 8,
        "model.order": [1, 0],
    }
