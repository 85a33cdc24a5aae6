"""The trained autoencoder and model as one object, which generates, encodes and edits images."""

from tokenbridge_jax.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
