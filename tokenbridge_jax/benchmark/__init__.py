"""Speed: what to time (`training.py`, `sampling/sampler.py`, `codec.py`, `loader.py`), and how.

`measure.py` makes a line of numbers of a case, from `timing.py` (seconds), `programs.py` (what the
compiler counts), `flops.py` (what the mathematics asks for), `ceilings.py` (what the device does at
best) and `profiles.py` (where its time goes).
"""
