"""The losses' kernels in Triton: the shape of each tile, how a tile is loaded, and one file a loss."""
