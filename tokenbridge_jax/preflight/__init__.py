"""Compiles for TPUs on a machine without one, and estimates a step's memory and time."""
