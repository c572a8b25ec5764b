"""Training of multi-length hashing networks with PyTorch."""
