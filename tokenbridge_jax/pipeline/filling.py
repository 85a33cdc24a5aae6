"""Fills the pixels of hidden positions from visible ones, before an image is encoded.

The encoder looks beyond a position, and its normalisation uses the whole image. So the content of
hidden positions would change the indices of visible ones. Hidden pixels take the colour of the
nearest visible pixel, which continues the image across the border. Over the width of a position
they fade to the mean colour, which keeps the normalisation close to that of the whole image.
`docs/editing.md` compares this with other fills.
"""

import numpy as np
import scipy
from jaxtyping import Bool, UInt8

# The fill of an image without visible pixels.
GREY = 128


def fill_hidden(
    images: UInt8[np.ndarray, "B H W I"], hidden: Bool[np.ndarray, "B H W"], width: int
) -> UInt8[np.ndarray, "B H W I"]:
    """Returns copies of images with hidden pixels filled; their old values have no effect.

    Args:
      images: uint8.
      hidden: the pixels to fill in each image.
      width: distance in pixels over which the share of the nearest visible colour falls to 1/e.
    """
    filled = images.copy()
    for image, where in zip(filled, hidden, strict=True):
        if where.all():
            image[:] = GREY
        elif where.any():
            distance, nearest = scipy.ndimage.distance_transform_edt(where, return_indices=True)
            share = np.exp(-distance[where] / width)[:, None]
            rows, columns = nearest[:, where]
            mean = image[~where].mean(axis=0)
            image[where] = np.round(share * image[rows, columns] + (1 - share) * mean)
    return filled
