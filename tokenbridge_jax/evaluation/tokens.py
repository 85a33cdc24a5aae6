"""Statistics of the indices of token shards: entropies, use of levels, Zipf's law, dependence.

All of them follow from counts: of the levels of every channel, and of pairs of levels, for every
two channels of a position and for every channel at neighbouring positions. At the paper's 64
levels, one pass over the shards counts everything. If too many pairs are possible for the memory,
several passes count some tables each. Entropies are in bits.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int64
from scipy.optimize import brentq
from scipy.sparse import coo_array, sparray
from scipy.sparse.csgraph import minimum_spanning_tree

from tokenbridge_jax.data import shards
from tokenbridge_jax.data.loader import TokenRecords
from tokenbridge_jax.evaluation import figures, report
from tokenbridge_jax.evaluation.token_counts import PLACES, Table, TokenCounts, all_tables
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress

_BATCH = 64
# Pairs of levels that one pass may count, over all tables: about a gigabyte.
_MOST_CELLS = 2**24
# Ranks of Zipf's law that are in memory together.
_RANKS = 2**20
# Points of a rank-frequency curve in the result; a plot shows no more.
_CURVE = 200

_CORRECTION = "Miller-Madow: (cells seen - 1) / (2 samples) nats are added to every entropy"


def token_statistics(
    folder: str | os.PathLike[str],
    split: str = "train",
    *,
    all_views: bool = False,
    max_images: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Computes statistics of a split of token shards. Several processes share the work.

    Args:
      folder: of the token shards.
      split: its name.
      all_views: count all views of an image (posterior samples, mirrored images), not only the
        first, which is not mirrored.
      max_images: the largest number of images, evenly spaced over the split; all by default.
      progress: print rate and ETA to stderr; of several processes the first does.

    Returns:
      Plain numbers and lists for JSON; lists over channels are in the autoencoder's order:
      `split`, `images`, `views` (per image that were counted), `samples` (positions that were
      counted), `positions`, `channels`, `levels`, `channel_order`, and
      `entropy`: bits of every channel, `plug_in` and `corrected`, their means, and the
        `bits_per_pixel` of a code that only uses these entropies;
      `level_use`: for every channel the `share` of levels that occur, the `perplexity` (2^bits),
        and the most and least used levels with their shares;
      `rank_frequency`: see `zipf_fit`, for `tokens` (channel, level), and for `pairs` (two channels
        and their levels at a position);
      `mutual_information`: bits, `plug_in` and `corrected`. `channels` is a matrix over channels at
        the same position with entropies on its diagonal; `right` and `below` are of a channel with
        itself at the next position. `total_correlation_at_least`, in bits per position, is the
        weight of the maximum spanning tree of the matrix (Chow & Liu, 1968). It is a lower bound
        of the loss by independent predictions of the channels without any context.

    Raises:
      UserError: the shards or the split are missing or damaged, or hold no images or no indices.
    """
    info = shards.read_info(folder)
    info.check_holds("indices", "a table of statistics")
    levels, processes = info.quantizer.levels, jax.process_count()
    records = TokenRecords(folder, info, split)
    if not len(records):
        raise UserError(f"split '{split}' of the token shards in {folder} holds no images")
    count = len(records) if max_images is None else min(max_images, len(records))
    if count < 1:
        raise UserError(f"max_images={max_images} must be at least 1")
    numbers = np.linspace(0, len(records) - 1, count).astype(np.int64)
    mine = np.array_split(numbers, processes)[jax.process_index()]
    views = info.views if all_views else 1
    # A process has at most as many cells as samples, and in the end gets those of all others.
    cells = processes * min(levels**2, -(-count // processes) * views * info.positions)
    tables = all_tables(info.channels)
    size = max(1, _MOST_CELLS // cells)
    parts = [tables[start : start + size] for start in range(0, len(tables), size)]

    def count_part(part: list[Table], bar: Progress) -> TokenCounts:
        counts = TokenCounts(info.channels, levels, part)
        for start in range(0, len(mine), _BATCH):
            chosen = records.read(mine[start : start + _BATCH])["indices"][:, :views]
            if chosen.max() >= levels:
                raise UserError(
                    f"the token shards in {folder} hold index {chosen.max()}, but have "
                    f"{levels} levels; put back a copy of that folder, or tokenize again with "
                    "another --workdir"
                )
            counts.update(chosen.reshape(-1, info.grid, info.grid, info.channels))
            bar.update(len(chosen))
        counts.sum_over_processes()
        return counts

    described: dict[str, Any] = {
        "split": split,
        "images": count,
        "views": views,
        "samples": count * views * info.positions,
        "positions": info.positions,
        "channels": info.channels,
        "levels": levels,
        "channel_order": list(info.channel_order),
    }
    visible = progress and jax.process_index() == 0
    with Progress(len(parts) * len(mine), desc="tokens", visible=visible) as bar:
        found = described | describe(count_part(part, bar) for part in parts)
    raw = info.positions * info.channels / info.image_size**2
    found["entropy"]["bits_per_pixel"] = raw * found["entropy"]["mean_corrected"]
    return found


def describe(counts: Iterable[TokenCounts]) -> dict[str, Any]:
    """The statistics of `token_statistics` that follow from counts.

    Args:
      counts: of some tables each, in the order of `all_tables`; only one is in memory at a time.
    """
    dependence: dict[str, list[Any]] = {place: [] for place in PLACES}
    # How often pairs occur, and the number of pairs that occur so often.
    often, times = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for part in counts:
        single = part.single
        for table, matrix in part.matrices():
            dependence[table.place].append([x[0] for x in mutual_information([matrix])])
            if table.place == "here":
                often, place = np.unique(np.append(often, matrix.data), return_inverse=True)
                added = np.append(times, np.ones(len(matrix.data), np.int64))
                times = np.zeros(len(often), np.int64)
                np.add.at(times, place, added)
    plug_in, corrected = entropies(single)
    shares = single / single.sum(axis=1, keepdims=True)
    possible = len(dependence["here"]) * single.shape[1] ** 2
    return {
        "entropy": {
            "unit": "bits",
            "correction": _CORRECTION,
            "plug_in": plug_in.tolist(),
            "corrected": corrected.tolist(),
            "mean_plug_in": float(plug_in.mean()),
            "mean_corrected": float(corrected.mean()),
        },
        "level_use": {
            "share": (single > 0).mean(axis=1).tolist(),
            "perplexity": (2**plug_in).tolist(),
            "most_used_level": shares.argmax(axis=1).tolist(),
            "most_used_share": shares.max(axis=1).tolist(),
            "least_used_level": shares.argmin(axis=1).tolist(),
            "least_used_share": shares.min(axis=1).tolist(),
        },
        "rank_frequency": {
            "tokens": zipf_fit(single.ravel()),
            "pairs": zipf_fit(often, times) | {"possible_types": possible},
        },
        "mutual_information": _dependence(dependence, plug_in, corrected),
    }


def _dependence(
    found: dict[str, list[Any]],
    plug_in: Float[np.ndarray, " C"],
    corrected: Float[np.ndarray, " C"],
) -> dict[str, Any]:
    """Summarises the estimates of all tables, given by their places."""
    above = np.triu_indices(len(plug_in), 1)
    here, right, below = (np.reshape(found[place], (-1, 2)).T for place in PLACES)
    matrices = []
    for diagonal, values in zip((plug_in, corrected), here, strict=True):
        matrix = np.diag(diagonal)
        matrix[above] = matrix.T[above] = values
        matrices.append(matrix)
    positive = np.maximum(np.triu(matrices[1], 1), 0)
    return {
        "unit": "bits",
        "correction": _CORRECTION,
        "channels": _estimates(*matrices),
        "right": _estimates(*right),
        "below": _estimates(*below),
        "total_correlation_at_least": float(-minimum_spanning_tree(-positive).sum()),
    }


def _estimates(plug_in: np.ndarray, corrected: np.ndarray) -> dict[str, Any]:
    return {"plug_in": plug_in.tolist(), "corrected": corrected.tolist()}


def entropies(
    counts: Int64[np.ndarray, "N K"],
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Entropies in bits from counts: the plug-in estimates, and Miller-Madow's.

    The plug-in estimate is too low by about (cells - 1) / (2 samples) nats (Miller, 1955).
    Miller-Madow's estimate adds this, for the cells that were seen. It assumes independent samples,
    but neighbouring positions are not independent. Without samples, both are 0.
    """
    totals = np.maximum(counts.sum(axis=1), 1)
    p = counts / totals[:, None]
    plug_in = -np.sum(p * np.log2(np.where(p > 0, p, 1)), axis=1) + 0.0
    seen = np.maximum(np.count_nonzero(counts, axis=1), 1)
    return plug_in, plug_in + (seen - 1) / (2 * totals * np.log(2))


def mutual_information(
    counts: Iterable[Int64[np.ndarray, "V V"] | sparray],
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Mutual information of two variables in bits, from joint counts: plug-in, and corrected.

    The plug-in estimate is too high, with 64 x 64 cells by up to 2863 bits over the number of
    samples. The corrected one uses Miller-Madow's entropies; it may be slightly negative.

    Args:
      counts: N matrices of joint counts, dense or sparse.
    """
    found = []
    for matrix in map(coo_array, counts):
        both = matrix.sum(axis=1), matrix.sum(axis=0), matrix.data
        one, other, joint = (np.array(entropies(x[None])) for x in both)
        found.append((one + other - joint)[:, 0])
    plug_in, corrected = np.transpose(found)
    return plug_in, corrected


def zipf_fit(
    counts: Int64[np.ndarray, " K"], times: Int64[np.ndarray, " K"] | None = None
) -> dict[str, Any]:
    """Fits frequency ~ 1 / rank^s to counts of types of tokens, by maximum likelihood.

    The n types that were seen are ranked, the most frequent first. The law is Zipf's, limited to n
    ranks. Its likelihood is largest where its mean log rank is that of the counts.

    Args:
      counts: how often types were seen.
      times: the number of types with each of these counts; one by default.

    Returns:
      `types`, the number of types seen, and `possible_types`; the `exponent` s, 0 for equally
      frequent types, None for fewer than two; `kolmogorov_smirnov`, the largest distance between
      the cumulative shares and the law's, 0 for a perfect fit; `r_squared`, the squared correlation
      of log count and log rank, 1 for a straight line; and a curve of at most 200 points: `ranks`,
      `shares`, and `fitted` shares.
    """
    times = np.ones_like(counts) if times is None else times
    order = np.flatnonzero(counts)
    order = order[np.argsort(-counts[order], kind="stable")]
    sorted_counts, last_ranks = counts[order], np.cumsum(times[order])
    types = int(last_ranks[-1]) if len(order) else 0
    total = int(sorted_counts @ times[order])
    possible = int(times.sum())
    found: dict[str, Any] = {"types": types, "possible_types": possible, "exponent": None}
    if types < 2:
        return found

    def ranks() -> Iterator[Int64[np.ndarray, " n"]]:
        for start in range(0, types, _RANKS):
            yield np.arange(start + 1, min(start + _RANKS, types) + 1)

    def counts_at(rank: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        return sorted_counts[np.searchsorted(last_ranks, rank)]

    def law(exponent: float) -> tuple[float, float]:
        """The sum of 1 / rank^s, and the law's mean log rank."""
        weight = weighted = 0.0
        for log_rank in map(np.log, ranks()):
            weights = np.exp(-exponent * log_rank)
            weight += float(weights.sum())
            weighted += float(weights @ log_rank)
        return weight, weighted / weight

    mean = float(sum(counts_at(rank) @ np.log(rank) for rank in ranks())) / total
    # The law's mean falls with s. At 0, decreasing shares have no larger one; at 64, it is near 0.
    falls = law(0.0)[1] - mean > 1e-12
    exponent = brentq(lambda s: law(s)[1] - mean, 0, 64) if falls else 0.0
    weight = law(exponent)[0]
    distance = seen = expected = 0.0
    centre = np.array([law(0.0)[1], np.log(sorted_counts) @ times[order] / types])
    products = np.zeros((2, 2))
    for rank in ranks():
        seen_until = seen + np.cumsum(counts_at(rank)) / total
        expected_until = expected + np.cumsum(np.exp(-exponent * np.log(rank))) / weight
        distance = max(distance, float(np.abs(seen_until - expected_until).max()))
        seen, expected = float(seen_until[-1]), float(expected_until[-1])
        logs = np.log([rank, counts_at(rank)]) - centre[:, None]
        products += logs @ logs.T
    straight = np.ptp(sorted_counts) > 0
    shown = np.unique(np.geomspace(1, types, _CURVE).round().astype(np.int64))
    return found | {
        "method": "maximum likelihood of Zipf's law over the ranks of the types seen",
        "exponent": float(exponent),
        "kolmogorov_smirnov": distance,
        "r_squared": float(products[0, 1] ** 2 / np.diag(products).prod()) if straight else None,
        "ranks": shown.tolist(),
        "shares": (counts_at(shown) / total).tolist(),
        "fitted": (np.exp(-exponent * np.log(shown)) / weight).tolist(),
    }


def table(statistics: Mapping[str, Any]) -> str:
    """The result of `token_statistics` as a text table: channels in channel order, then totals."""
    order = statistics["channel_order"]
    dependence = statistics["mutual_information"]
    between = np.array(dependence["channels"]["corrected"])
    rows = []
    for place, channel in enumerate(order):
        earlier = between[channel, order[:place]]
        rows.append(
            {
                "channel": str(channel),
                "bits": statistics["entropy"]["corrected"][channel],
                "perplexity": statistics["level_use"]["perplexity"][channel],
                "levels used": f"{statistics['level_use']['share'][channel]:.0%}",
                "known from an earlier channel": float(earlier.max()) if place else None,
                "known from the left position": dependence["right"]["corrected"][channel],
            }
        )
    ranks = statistics["rank_frequency"]
    lines = [
        report.columns(rows),
        f"mean {statistics['entropy']['mean_corrected']:.4f} of "
        f"{np.log2(statistics['levels']):g} bits per index; channels at a position share at least "
        f"{dependence['total_correlation_at_least']:.4f} bits",
    ]
    for name, fit in ranks.items():
        if fit["exponent"] is not None:
            lines.append(
                f"{name}: {fit['types']} of {fit['possible_types']} types seen; Zipf's exponent "
                f"{fit['exponent']:.3f}, distance from the law {fit['kolmogorov_smirnov']:.3f}"
            )
    return "\n".join(lines)


def plot(statistics: Mapping[str, Any], folder: epath.PathLike) -> list[epath.Path]:
    """Plots the result of `token_statistics` as PNGs; returns their paths."""
    folder = epath.Path(folder)
    return [
        _plot_channels(statistics, folder / "token_entropy.png"),
        _plot_ranks(statistics, folder / "token_ranks.png"),
        _plot_dependence(statistics, folder / "token_dependence.png"),
    ]


def _plot_channels(statistics: Mapping[str, Any], path: epath.Path) -> epath.Path:
    order = statistics["channel_order"]
    places = np.arange(len(order))
    entropy_ax, neighbour_ax = figures.make_axes(2)
    bits = np.array(statistics["entropy"]["corrected"])[order]
    entropy_ax.bar(places, bits, color=figures.BLUE)
    most = np.log2(statistics["levels"])
    entropy_ax.axhline(most, color=figures.GREY, linestyle="--")
    entropy_ax.set_ylim(0, 1.14 * most)
    label = f"{statistics['levels']} equally likely levels: {most:g} bits"
    entropy_ax.text(places[-1] + 0.4, 1.02 * most, label, ha="right", color=figures.GREY)
    entropy_ax.set_ylabel("entropy (bits)")
    found = statistics["mutual_information"]
    for name, colour, marker in (("right", figures.ORANGE, "o"), ("below", figures.GREEN, "s")):
        values = np.array(found[name]["corrected"])[order]
        neighbour_ax.plot(places, values, marker, color=colour, label=f"position {name}")
    neighbour_ax.set_ylim(bottom=0)
    neighbour_ax.set_ylabel("mutual information with\nthe same channel (bits)")
    neighbour_ax.legend(frameon=False)
    for ax in (entropy_ax, neighbour_ax):
        _label_channels(ax.xaxis, order)
        ax.grid(axis="x", visible=False)
    return figures.save(entropy_ax, path)


def _plot_ranks(statistics: Mapping[str, Any], path: epath.Path) -> epath.Path:
    axes = figures.make_axes(2)
    titles = {"tokens": "(channel, level)", "pairs": "(two channels, their levels)"}
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        fit = statistics["rank_frequency"][name]
        ax.set(title=title, xlabel="rank", ylabel="share of tokens", xscale="log", yscale="log")
        if fit["exponent"] is None:
            continue
        ax.plot(fit["ranks"], fit["shares"], ".", color=figures.BLUE, label="counted")
        law = f"1 / rank$^{{{fit['exponent']:.2f}}}$"
        ax.plot(fit["ranks"], fit["fitted"], color=figures.ORANGE, label=law)
        text = f"largest distance of\ncumulative shares {fit['kolmogorov_smirnov']:.3f}"
        ax.text(0.04, 0.06, text, transform=ax.transAxes, color=figures.GREY)
        ax.legend(frameon=False)
    return figures.save(axes[0], path)


def _plot_dependence(statistics: Mapping[str, Any], path: epath.Path) -> epath.Path:
    order = statistics["channel_order"]
    (ax,) = figures.make_axes(height=4.2)
    matrix = np.array(statistics["mutual_information"]["channels"]["corrected"])[order][:, order]
    np.fill_diagonal(matrix, np.nan)
    figures.matrix(ax, matrix, "mutual information at a position (bits)", smallest=0.0)
    _label_channels(ax.xaxis, order)
    _label_channels(ax.yaxis, order)
    return figures.save(ax, path)


def _label_channels(axis: Any, order: list[int]) -> None:
    axis.set_ticks(range(len(order)), [str(channel) for channel in order])
    axis.set_label_text("channel, in channel order")
