"""From files to batches: which images, in which order, decoded, cropped and masked."""
