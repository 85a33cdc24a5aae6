"""Exact negative log-likelihood of images, and the calibration of the head's probabilities.

A sampler reveals positions in some order, several per step. The probability of an image is the
product, over all steps, of the probabilities of the revealed indices given the positions that were
visible before. So one pass over the steps, with the image's own indices instead of drawn ones,
gives -log p(image | class, order). By Jensen's inequality, its mean over random orders is an upper
bound of -log p of the mixture of the orders. Guidance is off, the temperature is 1, and
`first_token_quirk` is as in sampling.
"""

import functools
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer

from tokenbridge_jax.data import class_names, shards
from tokenbridge_jax.data.loader import TokenRecords
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.evaluation import calibration, figures, report
from tokenbridge_jax.evaluation.calibration import Calibration
from tokenbridge_jax.loss import Examples, MaskDraw, map_slots
from tokenbridge_jax.model import TokenBridge
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress
from tokenbridge_jax.sampling.orders import make_orders
from tokenbridge_jax.sampling.schedule import SamplingSettings, make_plan


class Scores(NamedTuple):
    """The head's prediction of every index, given the positions that are visible at its step.

    Slots follow the order: the first slot is revealed last. Channels are in autoencoder order.

    Attributes:
      nll: the index's negative log-probability, in nats.
      confidence: the probability of the most likely level.
      correct: whether the index is the most likely level.
      below: the probability of all levels below the index.
    """

    nll: Float[np.ndarray | Array, "B L C"]
    confidence: Float[np.ndarray | Array, "B L C"]
    correct: Bool[np.ndarray | Array, "B L C"]
    below: Float[np.ndarray | Array, "B L C"]


class Scorer:
    """Scores batches of images, with one program per stage of the sampler's schedule.

    Attributes:
      hidden: the number of hidden positions before the first step and after every step.
    """

    def __init__(self, config: TokenBridgeConfig, mesh: Mesh, num_iter: int):
        """Args:
        config: the model.
        mesh: the devices of all processes, or of this one.
        num_iter: the number of reveal steps; L of them reveal one position at a time.
        """
        self._mesh = mesh
        self._plan = make_plan(config.positions, SamplingSettings(num_iter=num_iter))
        self.hidden = self._plan.hidden
        self._step = _step_on(mesh, config)

    def __call__(
        self,
        params: dict[str, Any],
        indices: Integer[np.ndarray | Array, "B L C"],
        labels: Int[np.ndarray | Array, " B"],
        orders: Int[np.ndarray | Array, "B L"],
    ) -> Scores:
        """Scores images; every process gets all scores.

        Args:
          params: the model's parameters, laid out on the mesh.
          indices: of whole images, positions row-major, channels in autoencoder order.
          labels: the classes of the images.
          orders: an order of the positions for every image; the last entry is revealed first.
        """
        parts = []
        steps = itertools.pairwise(self.hidden)
        with meshes.use_mesh(self._mesh):
            for stage, first, end in zip(
                self._plan.stages, (0, *self._plan.ends), self._plan.ends, strict=False
            ):
                for now, after in itertools.islice(steps, end - first):
                    draw = MaskDraw(np.int32(now), stage.reveals, stage.visible_slots)
                    found = self._step(params, indices, labels, orders, draw, np.int32(after))
                    parts.append((found, now - after))
        # The host waits only after the devices have all of the work.
        fields = zip(*([np.asarray(x)[:, :n] for x in found] for found, n in parts), strict=True)
        return Scores(*(np.concatenate(field[::-1], axis=1) for field in fields))


@functools.lru_cache(maxsize=4)
def _step_on(mesh: Mesh, config: TokenBridgeConfig) -> Callable[..., Scores]:
    """`_score_step` for a model, which is compiled only once."""
    score = functools.partial(_score_step, config)
    return jax.jit(score, out_shardings=meshes.replicated(mesh))


def _score_step(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    indices: Integer[Array, "B L C"],
    labels: Int[Array, " B"],
    orders: Int[Array, "B L"],
    draw: MaskDraw,
    after: Int[Array, ""],
) -> Scores:
    """Scores the slots from `after` to `draw.num_hidden`; these and all earlier slots are hidden.

    They are moved to the front, so that the head computes only them. (Attention ignores the order
    of hidden slots.) The slots after them, up to `draw.hidden_slots`, are padding.
    """
    slot, now = jnp.arange(config.positions), draw.num_hidden
    revealed = now - after
    moved = jnp.where(slot < revealed, slot + after, slot - revealed)
    layout = jnp.where(slot < now, moved, slot)
    examples = Examples(indices, labels, orders[:, layout], jnp.zeros(labels.shape, bool))
    return map_slots(_score, config, params, examples, draw)


def _score(
    model: TokenBridge, feature: Float[Array, "B m D"], indices: Integer[Array, "B m C"]
) -> Scores:
    order = np.array(model.config.channel_order)
    logits = model.logits(feature, indices, as_sampled=True)
    target = indices[..., order].astype(jnp.int32)
    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)
    lower = jnp.arange(model.config.levels)[None, None, None] < target[..., None]
    found = Scores(
        nll=-jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0],
        confidence=probs.max(axis=-1),
        correct=logits.argmax(axis=-1) == target,
        below=jnp.sum(jnp.where(lower, probs, 0), axis=-1),
    )
    return Scores(*(x[..., np.argsort(order)] for x in found))


def likelihood(
    pipeline: Pipeline,
    folder: str | os.PathLike[str],
    *,
    num_iter: int = 64,
    order: str = "random",
    num_orders: int = 1,
    seed: int = 0,
    split: str | None = None,
    max_images: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores the first view of every image in a split of token shards, with its label.

    Batch size, devices and processes only change float32 rounding. All processes whose devices are
    on the pipeline's mesh must call this; they get the same result.

    Args:
      pipeline: the model and the mesh to use.
      folder: of the token shards.
      num_iter: the number of reveal steps; with L steps, every position is predicted given all
        earlier ones.
      order: "random", "raster" or "halton".
      num_orders: random orders per image; order k of image i depends only on `seed` + k and i.
      seed: of the random orders.
      split: by default "validation", or "train" if there is no validation split.
      max_images: the largest number of images, evenly spaced over the split; all by default.
      batch_size: images at once, over all devices; rounded up to a multiple of the batch shards.
      progress: print rate and ETA to stderr; of several processes the first does.

    Returns:
      Plain numbers and lists for JSON: the settings; `first_token_quirk` of the model; `classes`, a
      remark, if the shards' class names differ from the model's; and
      `bits_per_index` and `bits_per_pixel` (an image's bits over its pixels), each with
        `..._standard_error` (over images; None for one image), and `raw_bits_per_index`, log2 V,
        and `raw_bits_per_pixel`, the size of the indices without a model;
      `by_channel`: bits per index, in the autoencoder's order; `by_position`: bits per index, as
        rows of the grid; `by_step`: for every step the number of positions `visible` before, the
        number `revealed`, and `bits_per_index`;
      `calibration`: of all indices; see `calibration.Calibration.summary`.

    Raises:
      UserError: the shards are missing, damaged, of another model or have its classes in another
        order; a setting is out of range; or the model's probabilities are NaN.
    """
    config = pipeline.config
    info = shards.read_info(folder)
    remark = _check_settings(pipeline.description, info)
    if order not in ("random", "raster", "halton"):
        raise UserError(
            f"sampling.order='{order}' has no exact likelihood; set it to random, raster or halton"
        )
    if num_orders < 1 or (num_orders > 1 and order != "random"):
        raise UserError(f"num_orders={num_orders} must be 1, or more for random orders")
    if not 0 <= seed <= 2**32 - num_orders:
        raise UserError(f"seed={seed} must be from 0 to 2**32 - num_orders")
    if split is None:
        split = "validation" if "validation" in info.splits else "train"
    records = TokenRecords(folder, info, split)
    count = len(records) if max_images is None else min(max_images, len(records))
    if count < 1 or batch_size < 1:
        raise UserError(
            f"there must be images and batches of at least 1, not {count} (split '{split}') and "
            f"{batch_size}"
        )
    numbers = np.linspace(0, len(records) - 1, count).astype(np.int32)
    scorer = Scorer(config, pipeline.mesh, num_iter)
    totals = _Totals(config, scorer.hidden, count, num_orders)
    draw = jax.jit(make_orders, static_argnums=(0, 3))
    size = meshes.round_up_batch(min(batch_size, count), pipeline.mesh)
    rows = meshes.local_rows(pipeline.mesh, size)
    visible = progress and jax.process_index() == 0
    with Progress(count * num_orders, desc="likelihood", visible=visible) as bar:
        for start in range(0, count, size):
            # Every batch has the same size: the last one repeats its last image.
            batch = numbers[np.minimum(np.arange(start, start + size), count - 1)]
            chosen = records.read(batch[rows].astype(np.int64))
            indices, labels = chosen["indices"][:, 0].copy(), chosen["label"].astype(np.int32)
            for k in range(num_orders):
                orders = np.asarray(draw(order, np.uint32(seed + k), batch, config.positions))
                local = indices, labels, orders[rows]
                scores = scorer(pipeline.params, *meshes.to_global(local, pipeline.mesh))
                totals.add(start, scores, orders)
                bar.update(min(size, count - start))
    described = {
        "split": split,
        "images": count,
        "view": 0,
        "order": order,
        "num_orders": num_orders,
        "seed": seed,
        "num_iter": num_iter,
        "steps": len(scorer.hidden) - 1,
        "dtype": config.dtype,
        "first_token_quirk": config.first_token_quirk,
        "channel_order": list(config.channel_order),
    }
    described |= {"classes": remark} if remark else {}
    return described | totals.summary(info.image_size**2)


def _check_settings(description: ModelDescription, info: DatasetInfo) -> str:
    """Checks that shards and model match; returns a remark if their class names differ."""
    config = description.config
    assert not isinstance(config.quantizer, Unquantized)
    assert not isinstance(info.quantizer, Unquantized)
    info.check_holds("indices", "the likelihood")
    info.check(
        levels=config.levels,
        channels=config.channels,
        positions=config.positions,
        autoencoder_hash=description.autoencoder_hash,
    )
    _, remark = class_names.match(description.class_names, info.class_names)
    theirs, ours = info.quantizer, config.quantizer
    # Imported levels may differ in their last bits.
    if not np.allclose(theirs.dequantized_levels, ours.dequantized_levels, rtol=0, atol=1e-3):
        raise UserError(
            "the quantizer of the token shards has other levels than the model's; tokenize again "
            "with another --workdir"
        )
    return remark


class _Totals:
    """Sums of scores in float64."""

    def __init__(
        self, config: TokenBridgeConfig, hidden: tuple[int, ...], images: int, num_orders: int
    ):
        self._config, self._hidden = config, np.array(hidden)
        # The negative log-likelihood of every image, the mean over its orders.
        self._nats = np.zeros(images)
        self._num_orders = num_orders
        self._by_channel = np.zeros(config.channels)
        self._by_position = np.zeros(config.positions)
        self._by_slot = np.zeros(config.positions)
        self._calibration = Calibration()

    def add(self, start: int, scores: Scores, orders: Int[np.ndarray, "B L"]) -> None:
        """Adds the scores of images from `start`, for one order; padding at the end is ignored."""
        new = min(len(orders), len(self._nats) - start)
        nll, confidence, correct, below = (np.asarray(field)[:new] for field in scores)
        nll = nll.astype(np.float64)
        if not np.isfinite(nll).all():
            raise UserError(
                "the model's probabilities are NaN: its checkpoint is damaged or training diverged"
            )
        by_slot = nll.sum(axis=2)
        self._nats[start : start + new] += nll.sum(axis=(1, 2)) / self._num_orders
        self._by_channel += nll.sum(axis=(0, 1))
        self._by_slot += by_slot.sum(axis=0)
        places = orders[:new].ravel()
        self._by_position += np.bincount(places, by_slot.ravel(), len(self._by_position))
        self._calibration.update(confidence, correct, below, np.exp(-nll))

    def summary(self, pixels: int) -> dict[str, Any]:
        """The numbers that `likelihood` reports, for images of this many pixels."""
        config, images = self._config, len(self._nats)
        of_image = config.positions * config.channels
        bits = self._nats.mean() / np.log(2)
        error = self._nats.std(ddof=1) / images**0.5 / np.log(2) if images > 1 else None
        per_nat = 1 / (images * self._num_orders * of_image * np.log(2))
        step_sums = np.add.reduceat(self._by_slot, self._hidden[:0:-1])[::-1]
        revealed = -np.diff(self._hidden)
        by_position = self._by_position * per_nat * config.positions
        grid = round(config.positions**0.5)
        return {
            "bits_per_index": float(bits / of_image),
            "bits_per_index_standard_error": error and float(error / of_image),
            "bits_per_pixel": float(bits / pixels),
            "bits_per_pixel_standard_error": error and float(error / pixels),
            "raw_bits_per_index": float(np.log2(config.levels)),
            "raw_bits_per_pixel": float(of_image * np.log2(config.levels) / pixels),
            "by_channel": (self._by_channel * per_nat * config.channels).tolist(),
            "by_position": by_position.reshape(grid, -1).tolist(),
            "by_step": {
                "visible": (config.positions - self._hidden[:-1]).tolist(),
                "revealed": revealed.tolist(),
                "bits_per_index": (step_sums * per_nat * config.positions / revealed).tolist(),
            },
            "calibration": self._calibration.summary(),
        }


def table(found: Mapping[str, Any]) -> str:
    """The result of `likelihood` as a text table: channels in channel order, steps, calibration."""
    bits, steps, head = found["by_channel"], found["by_step"], found["calibration"]
    rows = [{"channel": str(c), "bits per index": bits[c]} for c in found["channel_order"]]
    first, last = steps["bits_per_index"][0], steps["bits_per_index"][-1]
    quirk = ", with the first-token quirk" if found["first_token_quirk"] else ""
    return "\n".join(
        [
            report.columns(rows),
            f"{found['images']} images of split {found['split']}, {found['steps']} steps in "
            f"{found['order']} order{quirk}: {first:.4f} bits per index in the first step, "
            f"{last:.4f} in the last",
            f"the head's confidence is {head['confidence']:.4f}, its accuracy "
            f"{head['accuracy']:.4f}, the expected calibration error "
            f"{head['expected_calibration_error']:.4f}",
        ]
    )


def plot(found: Mapping[str, Any], folder: epath.PathLike) -> list[epath.Path]:
    """Plots the result of `likelihood` as PNGs; returns their paths."""
    folder = epath.Path(folder)
    return [
        _plot_bits(found, folder / "likelihood.png"),
        _plot_positions(found, folder / "likelihood_positions.png"),
        calibration.plot(found["calibration"], folder / "calibration.png"),
    ]


def _plot_bits(found: Mapping[str, Any], path: epath.Path) -> epath.Path:
    channel_ax, step_ax = figures.make_axes(2)
    order = found["channel_order"]
    channel_ax.bar(range(len(order)), np.array(found["by_channel"])[order], color=figures.BLUE)
    channel_ax.set_xticks(range(len(order)), [str(channel) for channel in order])
    channel_ax.set_xlabel("channel, in channel order")
    channel_ax.grid(axis="x", visible=False)
    steps = found["by_step"]
    # The bar of a step is as wide as the number of its positions.
    edges = [*steps["visible"], steps["visible"][-1] + steps["revealed"][-1]]
    step_ax.stairs(steps["bits_per_index"], edges, baseline=None, color=figures.BLUE, linewidth=2)
    step_ax.set_xlim(0, edges[-1])
    step_ax.set_xlabel(f"positions revealed, of {edges[-1]}")
    most = found["raw_bits_per_index"]
    for ax in (channel_ax, step_ax):
        ax.axhline(most, color=figures.GREY, linestyle="--", label="without a model")
        mean = f"mean {found['bits_per_index']:.3f}"
        ax.axhline(found["bits_per_index"], color=figures.ORANGE, label=mean)
        ax.set_ylabel("bits per index")
        ax.set_ylim(0, 1.25 * most)
        ax.legend(frameon=False, ncols=2, loc="upper right")
    return figures.save(step_ax, path)


def _plot_positions(found: Mapping[str, Any], path: epath.Path) -> epath.Path:
    (ax,) = figures.make_axes(height=4.2)
    figures.matrix(ax, found["by_position"], "bits per index")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="position from the left", ylabel="position from the top")
    return figures.save(ax, path)
