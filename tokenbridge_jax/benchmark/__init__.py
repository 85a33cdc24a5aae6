"""Speed: the cases to time, in the four files `*_speed.py`, and how to time them.

`measure.py` measures a case and writes its numbers as a line, with `timing.py` (seconds),
`programs.py` (what the compiler counts), `flops.py` (what the mathematics needs), `ceilings.py`
(the device's best) and `profiles.py` (where time is spent).
"""
