"""launch/cifar10.sh with stand-ins for the programs that it calls."""

import pytest
from checkout import Checkout


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    made = Checkout(tmp_path)
    made.stand_in(made.folder / ".venv/bin/python")
    return made


def run(checkout: Checkout, *arguments: str) -> tuple[list[list[str]], list[list[str]]]:
    """Runs the script in the environment of the stand-ins; returns their new calls."""
    before = {name: len(checkout.calls(name)) for name in ("tokenbridge", "python")}
    environment = str(checkout.folder / ".venv")
    checkout.run("cifar10.sh", *arguments, VIRTUAL_ENV=environment)
    return tuple(
        [call["args"] for call in checkout.calls(name)[count:]] for name, count in before.items()
    )


def test_the_script_runs_every_command_and_samples_once(checkout, tmp_path):
    data, workdir = tmp_path / "my data", tmp_path / "w--2"  # No flag.
    for split in ("train", "test"):
        (data / split).mkdir(parents=True)
    (workdir / "checkpoints").mkdir(parents=True)
    flag = "--config.seed=1 2"
    commands, python = run(checkout, str(data), str(workdir), "quick", flag)
    assert [arguments[0] for arguments in commands] == ["train-vae", "tokenize", "train", "sample"]
    config = ["--config", "configs/cifar10.py:quick", "--workdir", str(workdir)]
    config.append(f"--config.data.path={data}")
    for arguments in commands:
        assert arguments[1:6] == config
        assert arguments[-1] == flag
    assert commands[3][6:-1] == ["--num_images", "1000", "--output", str(workdir / "drawn")]
    assert python[-1][0] == "launch/score_cifar10.py"
    assert python[-1][-2:] == ["--pictures", "1000"]

    (workdir / "drawn").mkdir()
    (workdir / "drawn/samples.npz").touch()
    commands, python = run(checkout, str(data), str(workdir))
    assert [arguments[0] for arguments in commands] == ["train-vae", "tokenize", "train"]
    assert "configs/cifar10.py:size=S" in commands[0]
    assert "--pictures" not in python[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: bash launch/cifar10.sh DATA"),
        (["d", "quick"], "the second word is the workdir: cifar10.sh DATA WORKDIR quick"),
        (["d", "w", "--config.seed=1"], "flags come after the third word"),
    ],
)
def test_wrong_words_are_named(checkout, words: list[str], message: str):
    error = checkout.run("cifar10.sh", *words, status=2)
    assert error.count("\n") == 1
    assert message in error
    assert not checkout.calls("tokenbridge")


def test_an_environment_without_torch_is_named_before_anything_is_trained(checkout, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    environment = tmp_path / "bare"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin/python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    error = checkout.run(
        "cifar10.sh", str(tmp_path), str(tmp_path / "w"), VIRTUAL_ENV=str(environment), status=2
    )
    assert error.count("\n") == 1
    assert "its extra torch" in error
    assert not checkout.calls("tokenbridge")


def test_the_script_names_what_its_data_lack(checkout, tmp_path):
    def error() -> str:
        found = checkout.run("cifar10.sh", str(tmp_path / "data"), status=2)
        assert found.count("\n") == 1
        return found

    (tmp_path / "data/test/cat").mkdir(parents=True)
    assert f"there is no folder {tmp_path}/data/train;" in error()
    for name in ("cat", "dog"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
    (tmp_path / "data/train/README").touch()  # Only folders count.
    for number in range(5000):
        (tmp_path / f"data/train/{number}.png").touch()
    assert f"dog is not in both {tmp_path}/data/train and {tmp_path}/data/test;" in error()
    assert not checkout.calls("tokenbridge")
    assert "ARGUMENT  of the config" in checkout.run("cifar10.sh", "--help")
