"""The kernels, imported as `cjepa_fast.kernels`: each function takes plain tensors."""
