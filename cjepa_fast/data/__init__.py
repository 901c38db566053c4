"""From files to batches: which images, in which order, decoded, cropped and masked."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "evaluation": "eval_batches",
        "loader": "Batch Loader BatchSplit",
        "masks": "MaskSampler Masks",
        "sources": "ImageSet open_images",
    },
)
