"""Sampling indices: the schedule of steps, the orders of positions, the program, its batches."""
