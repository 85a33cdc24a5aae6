"""The trained autoencoder and model as one object, and what it does with pictures."""

from tokenbridge_jax.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
