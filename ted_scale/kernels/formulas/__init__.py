"""The definitions of the losses in plain torch, row by row; the Triton kernels compute the same."""
