"""Channel heads, which predict one position's C indices from the backbone's feature.

`head.Head` is their interface. `channel_ar` predicts one channel after another, `independent` all
at once, and `grouped` makes either predict groups of neighbouring channels as joint classes.
`model.make_head` builds the head that a config names.
"""
