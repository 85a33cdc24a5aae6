"""Compiles for TPUs on a machine without any, and estimates the memory and time of a step."""
