"""The sub-commands of `tokenbridge`, one module each; `runner.py` starts them."""
