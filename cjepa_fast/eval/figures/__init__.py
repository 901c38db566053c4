"""Figures: attention, PCA, masks, neighbours, curves."""
