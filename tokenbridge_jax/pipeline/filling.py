"""What the encoder sees where it may not look: hidden pixels, filled from the visible ones.

An encoder looks far, and its normalisation everywhere: whatever stands at hidden positions moves
the indices of visible ones. Their pixels take the colour of the nearest visible pixel, which goes
on what is at the border, and fade to the mean colour over the width of a position, which keeps the
normalisation near what it is without a hole. `docs/editing.md` measures it and others.
"""

import numpy as np
from jaxtyping import Bool, UInt8
from scipy.ndimage import distance_transform_edt

# Where nothing is visible.
GREY = 128


def fill_hidden(
    images: UInt8[np.ndarray, "B H W I"], hidden: Bool[np.ndarray, "B H W"], width: int
) -> UInt8[np.ndarray, "B H W I"]:
    """Images with their hidden pixels filled; nothing of these is in the result.

    Args:
      images: stay as they are.
      hidden: the pixels to fill, of each image.
      width: pixels over which the nearest visible colour fades, to 1/e, into the mean.
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
