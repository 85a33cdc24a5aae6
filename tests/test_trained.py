"""Flags `--config.model.KEY` of commands that read a trained model: they apply, or are refused."""

import numpy as np
import pytest
from evaluated import save_tiny

from tokenbridge_jax import Pipeline
from tokenbridge_jax.commands import runner
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

SETTINGS = {"num_iter": 2, "guidance": 1.0, "temperature": 1.0, "order": "random"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_tiny(folder, head="masked", reveal_steps=4, reveal_order="confidence")
    return folder


def drawn(model, output, *flags: str) -> np.ndarray:
    argv = [f"--workdir={model}", f"--output={output}", "--num_images=3"]
    settings = (f"--config.sampling.{name}={value}" for name, value in SETTINGS.items())
    assert runner.run("sample", [*argv, *flags, *settings]) == 0
    return storage.read_npz(output / "samples.npz")["arr_0"]


def test_settings_of_drawing_may_change_after_training(model, tmp_path):
    trained = drawn(model, tmp_path / "a")
    flagged = drawn(model, tmp_path / "b", "--config.model.reveal_steps=1")
    pipeline = Pipeline.load(model, drawing={"reveal_steps": 1})
    assert pipeline.config.reveal_steps == 1
    np.testing.assert_array_equal(flagged, pipeline.generate([0, 1, 2], **SETTINGS))
    assert (flagged != trained).any()
    # What training has fixed may be given, as launch/cifar10.sh does.
    same = drawn(model, tmp_path / "c", "--config.model.head=masked", "--config.model.remat=auto")
    np.testing.assert_array_equal(same, trained)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("encoder_layers=9", "--config.model.encoder_layers=9 has no effect on a trained model"),
        ("head=parallel", "--config.model.head=parallel has no effect on a trained model, which"),
        ("head=gan", "model.head='gan' is not one of channel_ar, parallel"),
        ("reveal_steps=99", "model.reveal_steps=99 must be at most the number of channels"),
    ],
)
def test_what_training_has_fixed_is_refused(model, tmp_path, capsys, flag, message):
    argv = [f"--workdir={model}", f"--output={tmp_path / 'x'}", f"--config.model.{flag}"]
    assert runner.run("sample", argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


CONFIG = """
from tokenbridge_jax.config import experiment
from tiny_model import tiny

def get_config():
    config = experiment("digits")
    model = tiny(head="masked", reveal_steps=4, reveal_order="confidence").to_json()
    config.model.update({key: model[key] for key in config.model if key != "channel_order"})
    config.model.update(CHANGES)
    return config
"""


def write_config(folder, **changes):
    """An experiment with the model of the workdir, and changes."""
    path = folder / f"{'_'.join(changes) or 'own'}.py"
    path.write_text(CONFIG.replace("CHANGES", repr(changes)))
    return f"--config={path}"


def test_an_experiment_may_be_named(model, tmp_path):
    """What does not decide which parameters there are may differ, and that of drawing applies."""
    trained = drawn(model, tmp_path / "a")
    same = drawn(model, tmp_path / "b", write_config(tmp_path))
    np.testing.assert_array_equal(same, trained)
    # As an import has it, and as it may change from run to run.
    changes = {"first_token_quirk": True, "dropout": 0.2, "remat": "full", "head_chunk": 64}
    same = drawn(model, tmp_path / "c", write_config(tmp_path, **changes))
    np.testing.assert_array_equal(same, trained)
    flagged = drawn(model, tmp_path / "d", "--config.model.reveal_steps=1")
    named = drawn(model, tmp_path / "e", write_config(tmp_path, reveal_steps=1))
    np.testing.assert_array_equal(named, flagged)


def test_the_experiment_of_another_model_is_refused(model, tmp_path, capsys):
    config = write_config(tmp_path, encoder_width=32)
    argv = [f"--workdir={model}", f"--output={tmp_path / 'x'}", config, "--config.mesh.tensor=3"]
    assert runner.run("sample", argv) == 2
    err = capsys.readouterr().err
    assert f"--config names a model whose encoder_width is 32, and that of {model} has 16" in err
    assert err.count("\n") == 1


def test_a_fixed_order_has_the_steps_of_training(tmp_path):
    save_tiny(tmp_path / "model", head="masked", reveal_steps=4)
    refused = r"reveal_steps=2: this model was trained for 4 steps in fixed order and can draw in"
    with pytest.raises(UserError, match=refused):
        Pipeline.load(tmp_path / "model", drawing={"reveal_steps": 2})
    Pipeline.load(tmp_path / "model", drawing={"reveal_steps": 4})


def test_other_settings_are_refused_in_python(model):
    for name in ("head", "dtype"):
        with pytest.raises(UserError, match=f"drawing has {name}, not one of head_steps, head_cl"):
            Pipeline.load(model, drawing={name: "parallel"})
    with pytest.raises(UserError, match=r"drawing=\['float8'\] must be a dict, such as"):
        Pipeline.load(model, drawing=["float8"])
