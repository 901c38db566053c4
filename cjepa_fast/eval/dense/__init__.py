"""Labels for every pixel or box: segmentation, detection, video propagation."""
