"""Heads, which predict one position's C values from the backbone's feature.

`head.Head` is their interface. Of indices, `channel_ar` predicts one channel after another,
`independent` all at once, `masked` several at each of a few steps, and `grouped` makes the first
two predict groups of neighbouring channels as joint classes. Of latents, `mixture` gives a density,
and `diffusion` and `flow` turn noise into latents by the network of `conditioned_mlp`.
`model.make_head` builds the head that a config names.
"""
