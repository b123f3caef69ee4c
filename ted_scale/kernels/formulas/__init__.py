"""The definitions of the losses in plain torch, row by row. The Triton kernels compute the same."""
