"""The losses' definitions in plain torch, row by row; the Triton kernels follow them."""
