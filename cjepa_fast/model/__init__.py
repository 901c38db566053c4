"""The networks and the loss: images and masks in, terms of the loss out."""
