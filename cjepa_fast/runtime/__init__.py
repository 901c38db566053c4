"""The machine a training runs on: what its hardware can do."""
