"""Channel heads: what predicts one position's C indices from the backbone's feature.

`head.Head` says what a head must give. `channel_ar` predicts one channel after another, `parallel`
all at once; `grouped` makes either predict groups of neighbouring channels as joint classes.
`model.make_head` makes the one that a config names.
"""
