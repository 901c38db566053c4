"""The figures of a moment of training, as arrays: for TensorBoard and the like."""

import numpy as np
import torch

from cjepa_fast.data.masks import Masks
from cjepa_fast.eval.figures import attention, mask_columns, pca
from cjepa_fast.eval.figures.sheets import Column, as_array, as_arrays
from cjepa_fast.model.vit import Encoder


@torch.inference_mode()
def figures(
    target: Encoder,
    context: Encoder,
    images_BCHW: torch.Tensor,
    masks: Masks,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> dict[str, np.ndarray]:
    """Each (height, width, 3) uint8: "masks", "attention" and "pca", a row an image.

    images_BCHW: normalised by mean and std, where the encoders are and in their dtype; masks: of
    these images. Both encoders run over them twice.
    """
    both = {"target": target, "context": context}
    image = Column("image", as_arrays(images_BCHW, mean, std))
    maps = attention.maps(both, images_BCHW, mean, std)
    drawn = {
        "masks": mask_columns.figure(images_BCHW, mean, std, masks, target.grid, "Masks"),
        "attention": attention.figure(image, maps, "Attention"),
        "pca": pca.figure(image, pca.scores(both, images_BCHW), "Patch features"),
    }
    return {name: as_array(figure) for name, figure in drawn.items()}
