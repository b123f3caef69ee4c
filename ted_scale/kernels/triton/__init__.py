"""The Triton kernels of the losses: tile shapes, tile loads and products, and one file a loss."""
