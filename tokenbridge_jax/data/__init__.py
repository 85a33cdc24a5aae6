"""Images in, token shards out, batches of indices or latents for training.

images.py   one picture -> a uint8 square, exactly as ADM cuts it
sources.py  where pictures come from: a class-folder tree, a TFDS archive, scikit-learn's digits
shards.py   the token shard format and `dataset.json`
batches.py  prepared pictures for the encoder, decoded ahead by threads
records.py  encoded batches as records of shards
loader.py   batches for training and validation
"""
