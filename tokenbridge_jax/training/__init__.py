"""Training: state, optimizer, step, checkpoints, metrics and the loop that joins them.

`train-vae` and `train` are the same loop over two tasks: `autoencoder_task.py` and `model_task.py`.
"""
