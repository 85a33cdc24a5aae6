"""The paper's ablations, one row each: `--config ablations:NAME` or `ablations:NAME,on=digits`.

  tokenbridge tokenize --config ablations:order_reverse --workdir runs/order_reverse
  tokenbridge train --workdir runs/order_reverse

(with an autoencoder in runs/order_reverse/autoencoder).

What the paper measured, as FID on ImageNet 256x256 (lower is better):

  prediction          head_channel_ar  1.94   head_parallel    15.7
  channel order       order_normal     1.94   order_frequency  1.89   order_reverse  no figure
  levels              levels_16        2.03   levels_32        1.98   levels_64      1.94
  channels a group    group_1          2.28   group_2          2.45   group_4        3.24
  head                head_256x3       2.88   head_512x3       2.72   head_512x4     2.65
  (width x layers)    head_1024x4      2.03   head_1024x6      1.94

Four tables share the figure 1.94. Here it is one experiment: size L with a head of 1024x6, all
channels one after another in the autoencoder's own ("normal") order, 64 levels. The table of groups
is another experiment. The published sizes of its heads are 60M, 63M and 530M parameters, as for 16
levels and 1024x3 (60.4M, 63.8M, 529.9M; with four layers they would be 79M, 83M and 549M).

"reverse" is the reversed order by frequency. Rows with the same number of levels train on the same
token shards, for any channel order: the indices are stored in the order of the autoencoder.

With `on=digits` everything except the head is as in the experiment `digits`. A row keeps its name
but has half of its levels (8, 16, 32), a sixteenth of its width and two thirds of its layers (16x2,
32x2, 32x3, 64x3, 64x4). It samples at temperature 1 without guidance, from the model's own
distribution: settings tuned for one row would favour it. `launch/ablations.py` compares all rows.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from tokenbridge_jax.config import experiment, parse_arg
from tokenbridge_jax.runtime.errors import UserError


class Row(NamedTuple):
    """An experiment in the paper's sizes; the tables share the default values."""

    table: str
    fid: float | None
    head: str = "channel_ar"
    channel_order: str = "identity"
    levels: int = 64
    group: int = 1
    width: int = 1024
    layers: int = 6


ROWS = {
    "head_channel_ar": Row("prediction", 1.94),
    "head_parallel": Row("prediction", 15.7, head="parallel"),
    "order_normal": Row("channel order", 1.94),
    "order_frequency": Row("channel order", 1.89, channel_order="tokens"),
    "order_reverse": Row("channel order", None, channel_order="reverse"),
    "levels_16": Row("levels", 2.03, levels=16),
    "levels_32": Row("levels", 1.98, levels=32),
    "levels_64": Row("levels", 1.94, levels=64),
    "group_1": Row("channels a group", 2.28, levels=16, layers=3, group=1),
    "group_2": Row("channels a group", 2.45, levels=16, layers=3, group=2),
    "group_4": Row("channels a group", 3.24, levels=16, layers=3, group=4),
    "head_256x3": Row("head", 2.88, width=256, layers=3),
    "head_512x3": Row("head", 2.72, width=512, layers=3),
    "head_512x4": Row("head", 2.65, width=512, layers=4),
    "head_1024x4": Row("head", 2.03, width=1024, layers=4),
    "head_1024x6": Row("head", 1.94, width=1024, layers=6),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`NAME` of a row, and `on=imagenet256` (size L, the default) or `on=digits`."""
    name, _, rest = (arg or "").partition(",")
    on = parse_arg(rest, on="imagenet256").on
    if name not in ROWS:
        raise UserError(
            f"there is no ablation '{name}'; its name comes first (NAME,on=digits), there are "
            f"{', '.join(ROWS)}"
        )
    if on not in ("imagenet256", "digits"):
        raise UserError(f"on={on} is not one of imagenet256, digits")
    row = ROWS[name]
    config = experiment(on)
    if on == "digits":
        layers = round(row.layers * 2 / 3)
        row = row._replace(levels=row.levels // 2, width=row.width // 16, layers=layers)
        config.sampling.update(guidance=1.0, temperature=1.0)
    config.quantizer.levels = row.levels
    config.model.update(
        head=row.head,
        channel_order=row.channel_order,
        channels_per_group=row.group,
        head_width=row.width,
        head_layers=row.layers,
    )
    if on == "imagenet256" and row.group == 4:
        config.model.head_chunk = 512  # 1 MiB of logits a position
    return config
