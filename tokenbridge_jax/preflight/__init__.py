"""Compiles for TPUs on a machine without one, and says what a step needs and how long it takes."""
