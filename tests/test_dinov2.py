"""DINOv2's network against transformers' with the same weights; resizing against Pillow's."""

import json
import sys

import jax
import numpy as np
import pytest
import torch
from evaluated import save_tiny, write_pictures
from PIL import Image
from safetensors.numpy import load_file
from scipy import linalg
from torch.nn.functional import interpolate

from tokenbridge_jax.commands import runner
from tokenbridge_jax.evaluation import dinov2, networks
from tokenbridge_jax.evaluation.features import DinoExtractor
from tokenbridge_jax.evaluation.image_sets import rgb
from tokenbridge_jax.runtime.errors import UserError

TINY = dinov2.Sizes(width=128, layers=3, patch=14, grid=5)


@pytest.fixture(scope="module")
def transformers():
    with pytest.MonkeyPatch.context() as patch:
        # With another build of PyTorch than its own, torchvision cannot be imported.
        patch.setitem(sys.modules, "torchvision", None)
        import transformers

        transformers.Dinov2Model  # noqa: B018  (This imports it.)
    return transformers


def random_model(transformers, sizes: dinov2.Sizes) -> torch.nn.Module:
    """Its features depend on every weight; matrices keep the size of what they multiply."""
    config = transformers.Dinov2Config(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // dinov2.HEAD_WIDTH,
        image_size=sizes.patch * sizes.grid,
        patch_size=sizes.patch,
    )
    with transformers.initialization.no_init_weights():
        model = transformers.Dinov2Model(config).eval()
    # So many random numbers would take longer than the network: the tensors share them.
    numbers = np.random.default_rng(0).uniform(-1, 1, 2**20).astype(np.float32)
    with torch.no_grad():
        for i, (name, weights) in enumerate(model.named_parameters()):
            spread = (3 / np.prod(weights.shape[1:])) ** 0.5 if name.endswith("weight") else 1
            values = np.resize(np.roll(numbers, 1009 * i), weights.shape)
            weights.copy_(torch.from_numpy(values) * spread)
    return model


def tokens(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        nchw = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return model(nchw).pooler_output.numpy()


@pytest.fixture(scope="module")
def model(transformers):
    return random_model(transformers, TINY)


@pytest.fixture(scope="module")
def state(model, tmp_path_factory) -> dict[str, np.ndarray]:
    """transformers writes files with the names of the published one."""
    folder = tmp_path_factory.mktemp("hugging_face")
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def original(state: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The same weights with facebookresearch's names."""
    renamed = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    found = {ours: state[theirs] for ours, theirs in renamed.items()}
    for i in range(layers):
        ours, theirs = f"blocks.{i}.", f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = [f"{theirs}attention.attention.{x}.{kind}" for x in ("query", "key", "value")]
            found[f"{ours}attn.qkv.{kind}"] = np.concatenate([state[part] for part in parts])
            found[f"{ours}attn.proj.{kind}"] = state[f"{theirs}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{ours}{name}.{kind}"] = state[f"{theirs}{name}.{kind}"]
        for part in ("1", "2"):
            found[f"{ours}ls{part}.gamma"] = state[f"{theirs}layer_scale{part}.lambda1"]
    return found


@pytest.mark.parametrize("side", [3, 5, 8])
def test_class_tokens_are_transformers(model, state, side: int):
    """Of fewer patches than the position embeddings have, of as many, and of more."""
    pixels = np.random.default_rng(1).normal(size=(3, 14 * side, 14 * side, 3)).astype(np.float32)
    params = dinov2.import_dinov2(state, TINY)
    found = jax.jit(dinov2.class_tokens)(params, pixels)
    expected = tokens(model, pixels)
    assert np.ptp(expected, axis=0).max() > 0.3  # The features depend on the image.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_class_tokens_of_vit_l_are_transformers(transformers):
    model = random_model(transformers, dinov2.VIT_L)
    pixels = np.random.default_rng(1).normal(size=(1, 224, 224, 3)).astype(np.float32)
    expected = tokens(model, pixels)
    published = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[-2]
        state[name.replace(layer, published.get(layer, layer))] = tensor.numpy()
    params = dinov2.import_dinov2(state, dinov2.VIT_L)
    found = jax.jit(dinov2.class_tokens)(params, pixels)
    assert found.shape == (1, DinoExtractor.size)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_features_are_those_of_pillows_pixels(model, state):
    """From uint8 pictures of another size; the mean and deviation are ImageNet's."""
    images = np.random.default_rng(2).integers(0, 256, (2, 40, 30, 3), np.uint8)
    resized = [
        Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images
    ]
    pixels = np.stack(resized) / 255
    pixels = ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
    params = dinov2.import_dinov2(state, TINY)
    expected = tokens(model, pixels)
    for precision, tolerance in (("highest", 1e-5), ("high", 1e-5), ("bfloat16", 0.05)):
        extractor = DinoExtractor(params, batch_size=8, precision=precision)
        found = extractor(images)
        assert (found.spatial, found.logits) == (None, None)
        assert extractor.facts["features_precision"] == precision
        np.testing.assert_allclose(found.pool, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (256, 190), (500, 5), (224, 224), (223, 225), (1, 1000)]
)
def test_resizing_is_pillows(height: int, width: int):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    images[0] = 255 * (images[0] > 127)  # Results beyond 0 and 255 are cut off.
    found = jax.jit(dinov2.resize)(images)
    for image, resized in zip(images, found, strict=True):
        expected = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resized, expected)


@pytest.mark.parametrize("size", [(16, 16), (37, 37), (40, 11)])
def test_positions_are_interpolated_as_in_pytorch(size: tuple[int, int]):
    positions = np.random.default_rng(0).normal(size=(37, 37, 6)).astype(np.float32)
    nchw = torch.from_numpy(positions.transpose(2, 0, 1)[None].copy())
    expected = interpolate(nchw, size=size, mode="bicubic", align_corners=False)[0]
    found = dinov2.resize_positions(positions, *size)
    np.testing.assert_allclose(found, expected.permute(1, 2, 0), rtol=0, atol=5e-5)


def test_both_layouts_give_the_same_parameters(state):
    assert dinov2.tensor_shapes(TINY) == {
        name: x.shape for name, x in original(state, 3).items() if name != "mask_token"
    }
    both = [dinov2.import_dinov2(x, TINY) for x in (state, original(state, 3))]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_weights_are_checked(state):
    def refused(state: dict[str, np.ndarray]) -> str:
        with pytest.raises(UserError) as refusal:
            dinov2.import_dinov2(state, TINY)
        return str(refusal.value)

    ours, name = original(state, 3), "blocks.1.mlp.fc2.weight"
    wrong = refused(ours | {name: ours[name].T})
    assert f"(1 of 48 tensors differ): {name}: (512, 128) instead of (128, 512)" in wrong
    name = "encoder.layer.2.attention.attention.key.bias"
    lacking = {key: x for key, x in state.items() if key != name}
    assert f"(1 of 60 tensors differ): {name}: missing" in refused(lacking)
    registers = ours | {"register_tokens": np.zeros((1, 4, 128), np.float32)}
    assert refused(registers).endswith("DINOv2's ViT-L/14: register_tokens too")
    # A network with more blocks.
    deeper = ours | {key.replace(".2.", ".3."): x for key, x in ours.items()}
    assert refused(deeper).endswith(
        "blocks.3.attn.proj.weight, blocks.3.attn.qkv.bias and 11 more too"
    )


def test_import_and_scores(tmp_path, monkeypatch, capsys):
    """`import-metrics`, then `evaluate` of pictures and of reconstructions."""
    sizes, rng = dinov2.Sizes(width=64, layers=1, patch=56, grid=5), np.random.default_rng(0)
    shapes = dinov2.tensor_shapes(sizes)
    state = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    monkeypatch.setattr(dinov2, "VIT_L", sizes)
    monkeypatch.setattr(DinoExtractor, "size", sizes.width)
    save_tiny(tmp_path / "model")
    write_pictures(tmp_path / "real")
    shown = np.random.default_rng(1).integers(0, 200, (9, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "fake.npz", shown)
    np.savez(tmp_path / "dinov2.npz", **state)

    def run(command: str, *flags: str) -> str:
        """The error, or nothing."""
        where = f"--networks={tmp_path / 'networks'}"
        status = runner.run(command, [*(flag.format(tmp_path) for flag in flags), where])
        error = capsys.readouterr().err
        assert status == (runner.EXIT_USER_ERROR if "error: " in error else 0), error
        return error.splitlines()[-1] if status else ""

    reference = ["reference", "--features=dinov2", "--images={}/real", "--output={}"]
    missing = run("evaluate", *reference)
    assert "networks holds no DINOv2 network: `tokenbridge import-metrics --help` says" in missing
    refused = run("import-metrics", "--dinov2={}/dinov2.npz")
    assert "dinov2.npz is not the published file: its SHA-256 begins with" in refused
    assert "not d5383ea8 or 399fba97; download it again" in refused
    assert not run("import-metrics", "--dinov2={}/dinov2.npz", "--unpublished")
    assert networks.load_network("dinov2", tmp_path / "networks").facts["dinov2_published"] is False

    assert not run("evaluate", *reference)
    found = ["--features=dinov2", "--reference={}/reference_real_dinov2.npz", "--output={}"]
    assert not run("evaluate", "generation", "--images={}/fake.npz", *found)
    (path,) = tmp_path.glob("generation_*/result.json")
    result = json.loads(path.read_text())
    extractor = DinoExtractor(dinov2.import_dinov2(state, sizes), batch_size=40)
    files = sorted((tmp_path / "real").iterdir())
    real = np.stack([np.asarray(Image.open(file)) for file in files])
    pools = [extractor(images).pool.astype(np.float64) for images in (rgb(shown), real)]
    (mean, covariance), (other_mean, other) = ((x.mean(axis=0), np.cov(x.T)) for x in pools)
    root = np.sqrt(np.maximum(linalg.eigvals(covariance @ other).real, 0)).sum()
    expected = ((mean - other_mean) ** 2).sum() + np.trace(covariance + other) - 2 * root
    assert result["metrics"]["fd_dinov2"] == pytest.approx(expected, rel=1e-3)
    assert result["metrics"].keys() == {"fd_dinov2", "precision", "recall"}
    assert result["facts"]["features"].startswith("DINOv2 ViT-L/14")
    assert not any("thumbnails" in line or "inception" in line for line in result["remarks"])

    images = ["--workdir={}/model", "--images={}/fake.npz", "--levels=8", "--ranges=3"]
    assert not run("evaluate", "reconstruction", *images, *found)
    (path,) = tmp_path.glob("reconstruction_*/result.json")
    assert (path.parent / "reconstruction.png").exists()
    rows = json.loads(path.read_text())["metrics"]["rows"]
    assert all(min(row["fd_dinov2"], row["fd_dinov2_reference"]) > 0 for row in rows)
