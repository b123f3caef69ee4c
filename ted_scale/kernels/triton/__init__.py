"""The Triton kernels of the losses: their shapes, and one file for each loss."""
