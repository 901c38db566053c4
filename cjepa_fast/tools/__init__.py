"""Commands that look over all layers."""
