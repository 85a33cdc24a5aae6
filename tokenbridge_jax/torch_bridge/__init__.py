"""Name tables between the parameters here and PyTorch state dicts."""
