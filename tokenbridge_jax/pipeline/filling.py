"""Fills the pixels of hidden positions from visible ones, before the encoder sees an image.

An encoder sees far, and its normalisation sees everything, so the content of hidden positions moves
the indices of visible ones. Hidden pixels take the colour of the nearest visible pixel, which
continues the border. Over the width of a position they fade to the mean colour, which keeps the
normalisation close to that of the whole image. `docs/editing.md` compares this with other fills.
"""

import numpy as np
from jaxtyping import Bool, UInt8
from scipy.ndimage import distance_transform_edt

# Where nothing is visible.
GREY = 128


def fill_hidden(
    images: UInt8[np.ndarray, "B H W I"], hidden: Bool[np.ndarray, "B H W"], width: int
) -> UInt8[np.ndarray, "B H W I"]:
    """Images with their hidden pixels filled; the result does not depend on those pixels.

    Args:
      images: not changed.
      hidden: the pixels to fill, for each image.
      width: distance in pixels over which the nearest visible colour fades, to 1/e, into the mean.
    """
    filled = images.copy()
    for image, where in zip(filled, hidden, strict=True):
        if where.all():
            image[:] = GREY
        elif where.any():
            distance, nearest = distance_transform_edt(where, return_indices=True)
            share = np.exp(-distance[where] / width)[:, None]
            rows, columns = nearest[:, where]
            mean = image[~where].mean(axis=0)
            image[where] = np.round(share * image[rows, columns] + (1 - share) * mean)
    return filled
