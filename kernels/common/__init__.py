"""What all kernels share: launching, Triton or its stand-in, sums of partial results."""
