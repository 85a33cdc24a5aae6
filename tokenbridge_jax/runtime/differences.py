"""Compares settings that are kept in a file with those of this run."""

import json
import re
from typing import Any


def first_difference(kept: Any, ours: Any, name: str = "") -> tuple[str, str, str] | None:
    """Finds the first value that differs between two trees of JSON.

    A `path` in a dict is not compared: it says where data are, not what they are.

    Args:
      kept: the tree of the file.
      ours: the tree of this run.
      name: of the two.

    Returns:
      The value's name with dots, such as `sampling.num_iter`, and both values as short text; None
      if the trees are equal.
    """
    if isinstance(kept, dict) and isinstance(ours, dict):
        for key in kept | ours:
            below = f"{name}.{key}" if name else key
            if key != "path" and (found := first_difference(kept.get(key), ours.get(key), below)):
                return found
        return None
    return None if kept == ours else (name, _short(kept), _short(ours))


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]  # Enough to distinguish two hashes.
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
