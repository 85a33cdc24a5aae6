"""Values of training sections that make no sense are named, with what they may be."""

import ml_collections
import pytest

from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training.settings import check_ranges, check_training


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
        ("dtype", "float99", "float32 or bfloat16"),
        ("dtype", "int8", "float32 or bfloat16"),
        ("epochs", "many", "a finite number"),  # Of a value that was not set, no type is known.
    ],
)
def test_values_that_make_no_sense_are_named(key, value, message):
    config = ml_collections.ConfigDict({"training": {"steps": 3, key: value}})
    with pytest.raises(UserError, match=rf"^training\.{key} is {value}; it must be .*{message}"):
        check_ranges(config, "training")


def test_values_at_the_edge_will_do():
    section = dict(batch_size=8, clip=0.0, ema_decay=0.0, eval_every=0, epochs=None, keep=1)
    section |= dict(head_fraction=1.0)
    check_training(ml_collections.ConfigDict({"x": section}), "x", meshes.make_mesh(2, 2, 2))


def test_a_batch_that_does_not_divide_is_told_what_does():
    config = ml_collections.ConfigDict({"training": {"batch_size": 12, "accumulation": 2}})
    with pytest.raises(UserError, match=r"^training.batch_size 12 .* multiple of 8"):
        check_training(config, "training", meshes.make_mesh(2, 2, 2))
