"""Reconstruction of images: the loss of quality by quantization and by wrong indices.

Every image is encoded once. Its latents are decoded unchanged, quantized in several ways, and with
some of their indices moved; the results are compared with the original. Only one batch of images
and latents is in memory at a time. Scores are summed in float64, in the images' order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8
from scipy.special import log_softmax

from tokenbridge_jax.codec import Codec
from tokenbridge_jax.evaluation import figures, lpips, pixels, report
from tokenbridge_jax.evaluation.features import Extractor, blocks
from tokenbridge_jax.evaluation.image_sets import ImageSet, rgb
from tokenbridge_jax.evaluation.metrics import frechet_distance
from tokenbridge_jax.evaluation.moments import Gaussian, Moments
from tokenbridge_jax.evaluation.variants import Variant, perturb
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress

# The smallest number of images after which the processes exchange their results: with Inception's
# features, these take 3 MB per variant.
_BLOCK = 256
# The batch size without an extractor, which has its own.
_BATCH = 64
# Splits of the inception score: split s has the images s, s + 10, s + 20, ...
_SPLITS = 10


class Found(NamedTuple):
    """Results for n images: the originals, or those reconstructed from a variant.

    Attributes:
      scores: those in `_NAMES`, then LPIPS; for the originals, moments of the latents.
      used: which levels occur; None without quantization.
      pool: features, if there is an extractor.
      logits: if the extractor has them.
    """

    scores: Float[np.ndarray, "n K"]
    used: Bool[np.ndarray, "n C V"] | None = None
    pool: Float[np.ndarray, "n D"] | None = None
    logits: Float[np.ndarray, "n classes"] | None = None


_NAMES = ("clipped_share", "latent_mse", "perturbation_mse", "psnr", "ssim")


def reconstruction(
    codec: Codec,
    images: ImageSet,
    variants: Sequence[Variant],
    *,
    extractor: Extractor | None = None,
    reference: Gaussian | None = None,
    perceptual: Mapping[str, lpips.Params] | None = None,
    posterior: str = "mean",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores the variants on a set of images. Several processes share the images.

    Args:
      codec: on devices of this process.
      images: the originals, the same in every process; the downsampling divides their sides.
      variants: see `variants.sweep`.
      extractor: computes features for Frechet distances (and inception scores, if it has logits).
      reference: mean and covariance of the same features over other images, such as ImageNet's
        training images.
      perceptual: parameters of LPIPS, by network.
      posterior: "mean" encodes to the posterior's mean, "sample" to a sample of it. The sample of
        image i depends only on `seed` and i.
      seed: of the posterior's samples, and of perturbations.
      progress: print rate and ETA to stderr; of several processes the first does.

    Returns:
      Plain numbers for JSON: `images`, `posterior`, `seed`, `quantizer` (the codec's `levels` and
      `range`), `latent_variance` (over images and positions, the mean over channels), and `rows`,
      one per variant, with `levels`, `range`, `share`, `delta`, and these, or None if unknown:
      `rfid`: Frechet distance from the originals' features (pFID if indices are perturbed), and
        `rfid_reference`, from the reference; for DINOv2, `fd_dinov2` and `fd_dinov2_reference`; for
        thumbnails, `thumbnail_distance` and `thumbnail_distance_reference`;
      `inception_score`, `inception_score_std`: over ten splits, each of every tenth image;
      `psnr` in decibels, `ssim`, `lpips_NETWORK`: of uint8 pixels, means over images;
      `clipped_share`: the share of the latents beyond the quantizer's range; `levels_used`: the
        share of levels that occur, the mean over channels;
      `latent_mse`, in squared units of latents, and `latent_snr_db`, the latents' variance over it;
        `perturbation_mse` and `perturbation_snr_db`: the same for the moved indices only, compared
        with the quantized latents.

    Raises:
      UserError: an image does not fit the autoencoder, latents or features are NaN, or there are
        too few images for Frechet distances.
    """
    if posterior not in ("mean", "sample"):
        raise UserError(f"posterior='{posterior}' is neither 'mean' nor 'sample'")
    if min(images.shape[:2]) < pixels.WINDOW:
        raise UserError(
            f"{images.path}: SSIM needs images of at least {pixels.WINDOW} pixels a side"
        )
    batch_size = extractor.batch_size if extractor else _BATCH
    distances = {
        name: _distance(codec, name, params, batch_size)
        for name, params in (perceptual or {}).items()
    }
    names = [*_NAMES, *(f"lpips_{name}" for name in distances)]

    def of_batch(batch: UInt8[np.ndarray, "n H W C"], numbers: np.ndarray) -> list[Found]:
        """Results for the originals, and for every variant."""
        batch = _as_encoded(batch, codec, images)
        encoded = codec.encode(batch, numbers if posterior == "sample" else None, seed)
        latents, broken = np.asarray(encoded.latents), np.asarray(encoded.broken)
        if broken.any():
            raise UserError(f"{images.path}: latents of image {numbers[broken][0]} are NaN")
        made = [_change(variant, latents, numbers, seed) for variant in variants]
        # The device gets all of them before the host waits for the first.
        decoded = [codec.decode_latents(one.latents) for one in made]
        wide = latents.astype(np.float64)
        moments = [wide.mean(axis=(1, 2)), (wide**2).mean(axis=(1, 2))]
        found = [Found(np.concatenate(moments, axis=1), None, *_features(extractor, batch))]
        for one, on_device in zip(made, decoded, strict=True):
            result = np.asarray(on_device)
            scores = [*one.scores, pixels.psnr(batch, result), pixels.ssim(batch, result)]
            scores += [distance(batch, result) for distance in distances.values()]
            features = _features(extractor, result)
            found.append(Found(np.stack(scores, axis=1), one.used, *features))
        return found

    size = max(_BLOCK, batch_size * jax.process_count())
    originals, *rows = [_Sums() for _ in range(len(variants) + 1)]
    visible = progress and jax.process_index() == 0
    with Progress(images.count, desc="reconstruct", visible=visible) as bar:
        for numbers, found in blocks(images, size, batch_size, of_batch):
            for sums, part in zip([originals, *rows], found, strict=True):
                sums.add(part, numbers)
            bar.update(len(numbers))
    assert not isinstance(codec.quantizer, Unquantized)
    mean, square = np.split(originals.scores / images.count, 2)
    variance = float(np.mean(square - mean**2))
    distance = "rfid" if extractor is None or extractor.distance == "fid" else extractor.distance
    references = {distance: originals.gaussian(), f"{distance}_reference": reference}
    return {
        "images": images.count,
        "posterior": posterior,
        "seed": seed,
        "quantizer": {"levels": codec.quantizer.levels, "range": codec.quantizer.maximum},
        "latent_variance": variance,
        "rows": [
            _summary(variant, sums, names, variance, references)
            for variant, sums in zip(variants, rows, strict=True)
        ],
    }


class _Changed(NamedTuple):
    """Latents to decode, their first three scores of `_NAMES`, and the levels that occur."""

    latents: Float[np.ndarray, "n h w C"]
    scores: list[Float[np.ndarray, " n"]]
    used: Bool[np.ndarray, "n C V"] | None


_quantize = jax.jit(lambda quantizer, latents: quantizer.quantize(latents), static_argnums=0)


def _change(
    variant: Variant,
    latents: Float[np.ndarray, "n h w C"],
    numbers: Int[np.ndarray, " n"],
    seed: int,
) -> _Changed:
    quantizer = variant.quantizer
    if quantizer is None:
        return _Changed(latents, [np.zeros(len(latents))] * 3, None)
    indices = np.asarray(_quantize(quantizer, latents)).astype(np.int64)
    channels = indices.shape[-1]
    indices = indices.reshape(len(latents), -1, channels)
    unmoved = quantizer.dequantized_levels[indices].reshape(latents.shape)
    if variant.share:
        indices = perturb(indices, numbers, quantizer.levels, variant, seed)
    moved = quantizer.dequantized_levels[indices].reshape(latents.shape)
    used = np.zeros((len(latents), channels, quantizer.levels), bool)
    used[np.arange(len(latents))[:, None, None], np.arange(channels)[None, None], indices] = True
    clipped = np.asarray(quantizer.clipped(latents)).mean(axis=(1, 2, 3))
    return _Changed(moved, [clipped, _error(latents, moved), _error(unmoved, moved)], used)


def _error(
    one: Float[np.ndarray, "n h w C"], other: Float[np.ndarray, "n h w C"]
) -> Float[np.ndarray, " n"]:
    return ((one.astype(np.float64) - other) ** 2).mean(axis=(1, 2, 3))


def _distance(
    codec: Codec, network: str, params: lpips.Params, batch_size: int
) -> Callable[..., Float[np.ndarray, " n"]]:
    """LPIPS of pairs of at most `batch_size` images, on the codec's devices."""
    size = meshes.round_up_batch(batch_size, codec.mesh)
    held = jax.device_put(dict(params), meshes.replicated(codec.mesh))
    compiled = jax.jit(functools.partial(lpips.distance, network=network))

    def distance(*pair: UInt8[np.ndarray, "n H W C"]) -> Float[np.ndarray, " n"]:
        count = len(pair[0])
        full = [np.pad(rgb(x), [(0, size - count), (0, 0), (0, 0), (0, 0)]) for x in pair]
        found = compiled(held, *jax.device_put(full, meshes.batch_sharding(codec.mesh)))
        return np.asarray(found)[:count].astype(np.float64)

    return distance


def _as_encoded(
    batch: UInt8[np.ndarray, "n H W 3"], codec: Codec, images: ImageSet
) -> UInt8[np.ndarray, "n H W I"]:
    """The images with the channels of the autoencoder."""
    if codec.config.image_channels == 3:
        return batch
    if (batch != batch[..., :1]).any():
        raise UserError(f"{images.path}: there are colours, but the autoencoder takes grey images")
    return batch[..., :1]


def _features(extractor: Extractor | None, images: UInt8[np.ndarray, "n H W I"]) -> tuple[Any, Any]:
    if extractor is None:
        return None, None
    found = extractor(rgb(images))
    return found.pool, found.logits


class _Sums:
    """Sums of `Found` over all images.

    Attributes:
      count: the number of images.
      scores: the sums of their scores.
      used: which levels occur.
    """

    def __init__(self) -> None:
        self.count = 0
        self.scores: Any = 0
        self.used: Any = False
        self._moments: Moments | None = None
        # For every split: the number of images, and the sums of their p and of their p log p.
        self._splits: list[list[Any]] = [[0, 0, 0] for _ in range(_SPLITS)]

    def add(self, found: Found, numbers: Int[np.ndarray, " n"]) -> None:
        """Adds a block of images."""
        self.count += len(numbers)
        self.scores = self.scores + found.scores.sum(axis=0)
        if found.used is not None:
            self.used = self.used | found.used.any(axis=0)
        if found.pool is not None:
            self._moments = self._moments or Moments(found.pool.shape[1])
            self._moments.update(found.pool)
        if found.logits is None:
            return
        log_p = log_softmax(found.logits.astype(np.float64), axis=1)
        for split, sums in enumerate(self._splits):
            part = log_p[numbers % _SPLITS == split]
            sums[0] += len(part)
            sums[1] = sums[1] + np.exp(part).sum(axis=0)
            sums[2] += float((np.exp(part) * part).sum())

    def gaussian(self) -> Gaussian | None:
        """Mean and covariance of the features, if there are any."""
        return None if self._moments is None else self._moments.gaussian()

    def inception_score(self) -> tuple[float, float] | tuple[None, None]:
        """Mean and (population) standard deviation over the splits, if none is empty."""
        if not all(count for count, _, _ in self._splits):
            return None, None
        scores = []
        for count, p, p_log_p in self._splits:
            mean = p / count
            entropy = -(mean * np.log(np.where(mean > 0, mean, 1))).sum()
            scores.append(np.exp(p_log_p / count + entropy))
        return float(np.mean(scores)), float(np.std(scores))


def _summary(
    variant: Variant,
    sums: _Sums,
    names: Sequence[str],
    variance: float,
    references: Mapping[str, Gaussian | None],
) -> dict[str, Any]:
    quantizer = variant.quantizer
    row: dict[str, Any] = {
        "levels": quantizer and quantizer.levels,
        "range": quantizer and quantizer.maximum,
        "share": variant.share,
        "delta": variant.delta,
    }
    features = sums.gaussian()
    for name, reference in references.items():
        row[name] = features and reference and frechet_distance(features, reference)
    score, deviation = sums.inception_score()
    row |= {"inception_score": score, "inception_score_std": deviation}
    means = dict(zip(names, (sums.scores / sums.count).tolist(), strict=True))
    for name in ("latent", "perturbation"):
        error = means[f"{name}_mse"]
        means[f"{name}_snr_db"] = float(10 * np.log10(variance / error)) if error else None
    if not np.isfinite(means["psnr"]):  # An image is reconstructed exactly.
        means["psnr"] = None
    row["levels_used"] = None if quantizer is None else float(sums.used.mean())
    unknown = ["clipped_share"] * (quantizer is None)
    unknown += ["perturbation_mse", "perturbation_snr_db"] * (not variant.share)
    return row | means | dict.fromkeys(unknown)


def table(found: Mapping[str, Any]) -> str:
    """The result of `reconstruction` as a text table; the model's own quantizer is marked."""
    own, rows = found["quantizer"], []
    decimals = {"psnr": 2, "ssim": 4, "latent_snr_db": 1, "clipped_share": 4, "levels_used": 2}
    skipped = {"levels", "range", "share", "delta", "latent_mse"}
    measured = [name for name in found["rows"][0] if name not in skipped]
    measured = [name for name in measured if any(row[name] is not None for row in found["rows"])]
    for row in found["rows"]:
        mark = "*" if own.items() <= row.items() else ""
        cells = {"levels": f"{row['levels']}{mark}" if row["levels"] else "continuous"}
        cells["range"] = f"{row['range']:g}" if row["range"] else "-"
        cells["moved"] = f"{row['share']:g}:{row['delta']}" if row["share"] else "-"
        for name in measured:
            value = row[name]
            cells[name] = "-" if value is None else f"{value:.{decimals.get(name, 4)}f}"
        rows.append(cells)
    return report.columns(rows) + "\n* the model's own"


def plot(found: Mapping[str, Any], folder: epath.PathLike) -> list[epath.Path]:
    """Plots the result of `reconstruction` of a `sweep` as a PNG; returns its path, in a list."""
    rows = found["rows"]
    names = {
        "rfid": "rFID, from the originals",
        "fd_dinov2": "FD_DINOv2, from the originals",
        "thumbnail_distance": "thumbnail distance\nfrom the originals",
        "psnr": "PSNR (dB)",
    }
    metric = next(name for name in names if rows[0].get(name) is not None)
    quantized = [row for row in rows if row["levels"] and not row["share"]]
    perturbed = [row for row in rows if row["share"]]
    own = found["quantizer"]
    unmoved = [row for row in quantized if own.items() <= row.items()]
    level_ax, range_ax, *more = figures.make_axes(3 if perturbed else 2, width=4.4)
    for ax, name, other in ((level_ax, "levels", "range"), (range_ax, "range", "levels")):
        line = sorted((row[name], row[metric]) for row in quantized if row[other] == own[other])
        ax.axhline(rows[0][metric], color=figures.GREY, linestyle="--", label="continuous")
        ax.plot(*zip(*line, strict=True), "o-", color=figures.BLUE, label="quantized")
    level_ax.set(xscale="log", xlabel=f"levels, at a range of ±{own['range']:g}")
    ticks = sorted({row["levels"] for row in quantized})
    level_ax.set_xticks(ticks, [str(tick) for tick in ticks])
    level_ax.minorticks_off()
    range_ax.set_xticks(sorted({row["range"] for row in quantized}))
    range_ax.set_xlabel(f"range ±R, at {own['levels']} levels")
    for ax in more:
        for delta in sorted({row["delta"] for row in perturbed}):
            of_delta = [row for row in perturbed if row["delta"] == delta]
            line = sorted((row["share"], row[metric]) for row in [*unmoved, *of_delta])
            ax.plot(*zip(*line, strict=True), "o-", label=f"by up to ±{delta}")
        ax.set(xlabel="share of indices moved", xlim=(0, None))
        ax.set_title(f"at {own['levels']} levels, range ±{own['range']:g}", fontsize="medium")
    for ax in (level_ax, range_ax, *more):
        ax.set_ylabel(names[metric])
        if metric != "psnr":
            ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
    return [figures.save(level_ax, epath.Path(folder) / "reconstruction.png")]
