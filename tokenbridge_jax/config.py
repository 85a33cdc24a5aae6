"""The argument of a config file: `--config configs/imagenet256.py:size=L,quick`."""

from typing import Any

from ml_collections import ConfigDict

from tokenbridge_jax.runtime.errors import UserError


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses `key=value,flag` into a config; types are those of the defaults.

    Args:
      arg: what stands behind the colon; a key alone means true.
      **defaults: every key there is, with its default value.

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
