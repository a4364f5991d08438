"""How TPU kernels read keys and values, one file a representation."""
