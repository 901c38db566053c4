"""Datasets of a known form: the synthetic shapes, COCO, DAVIS, image and label-map pairs."""
