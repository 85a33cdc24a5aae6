"""Every config builds; arguments and overrides are checked."""

import importlib.util
from pathlib import Path

import pytest

from tokenbridge_jax.config import parse_arg
from tokenbridge_jax.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
ARGUMENTS = {
    "digits": [None, "quick"],
    "imagenet256": [None, "size=B", "size=H,tfds", "size=L,quick"],
}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(ARGUMENTS)


def test_unknown_arguments_are_refused():
    with pytest.raises(UserError, match="no argument 'sizes'; it takes quick, size"):
        parse_arg("sizes=L", size="L", quick=False)
    with pytest.raises(UserError, match="steps=many is not a int"):
        parse_arg("steps=many", steps=3)
    with pytest.raises(UserError, match="quick=maybe must be true or false"):
        parse_arg("quick=maybe", quick=False)
    with pytest.raises(UserError, match="size=XL is not one of B, L, H"):
        load("imagenet256").get_config("size=XL")


def test_arguments_take_the_type_of_their_default():
    parsed = parse_arg("steps=5,rate=1e-3,quick", steps=1, rate=0.5, quick=False, name="x")
    assert parsed.to_dict() == {"steps": 5, "rate": 1e-3, "quick": True, "name": "x"}
