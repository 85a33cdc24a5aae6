"""Measures speed. The four files `*_speed.py` define the cases.

`measure.py` measures a case and prints its numbers as a line of JSON. It uses `timing.py` (the
seconds), `programs.py` (the compiler's counts), `ceilings.py` (the best rates of the device) and
`profiles.py` (where the time goes).
"""
