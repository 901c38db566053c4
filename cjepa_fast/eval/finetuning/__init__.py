"""An encoder trained on with labels, and what that recipe is made of."""
