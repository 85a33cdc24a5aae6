"""What the files of `configs/` are made with, and how a built-in one is found by its name.

An experiment is a file of `configs/` whose `get_config(arg)` changes values of `configs/base.py`.
"""

import os
import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from tokenbridge_jax.runtime.errors import UserError

# A value that training picks for its devices.
AUTO = "auto"


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses the argument of an experiment, `key=value,flag`; types are those of the defaults.

    Args:
      arg: the text after the colon; a key alone means true.
      **defaults: all keys with their default values.

    Raises:
      UserError: a key is unknown or a value has the wrong type.
    """
    parsed = ConfigDict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, equals, value = item.partition("=")
        if key not in defaults:
            raise UserError(
                f"the config takes no argument '{key}'; it takes {', '.join(sorted(defaults))}"
            )
        kind = type(defaults[key])
        if kind is bool:
            if value.lower() not in ("", "true", "false"):
                raise UserError(f"config argument {key}={value} must be true or false")
            parsed[key] = value.lower() != "false"
            continue
        try:
            parsed[key] = kind(value)
        except ValueError:
            raise UserError(f"config argument {key}={value} is not a {kind.__name__}") from None
        if not equals:
            raise UserError(f"config argument {key} needs a value: {key}=...")
    return parsed


def experiments() -> dict[str, Path]:
    """The built-in experiments, name -> file, of an installed package or of a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def experiment(name: str) -> ConfigDict:
    """The config of a built-in experiment, without an argument; `base` has every key."""
    return runpy.run_path(str(experiments()[name]))["get_config"]()


def experiment_file(text: str) -> str:
    """`NAME[:arg]` of a built-in experiment or `FILE.py[:arg]` -> `FILE.py[:arg]`.

    Raises:
      UserError: there is no experiment of this name; the message lists the built-in ones.
    """
    name, colon, argument = text.partition(":")
    if name.endswith(".py") or os.sep in name:
        return text
    found = experiments()
    if name not in found:
        raise UserError(
            f"there is no experiment '{name}'; the built-in ones are {', '.join(found)}, and a "
            "file's name ends in .py"
        )
    return f"{found[name]}{colon}{argument}"


def settable(value: Any = AUTO) -> FieldReference:
    """A value of a config that values of other types may replace, in programs and by flags."""
    return FieldReference(value, field_type=object)
