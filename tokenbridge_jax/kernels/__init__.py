"""Attention where XLA leaves a gap: Pallas kernels for GPUs, beside the plain versions that every
other platform runs and that the kernels are tested against."""
