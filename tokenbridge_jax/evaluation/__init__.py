"""Measures images, reconstructions, likelihoods and token statistics."""
