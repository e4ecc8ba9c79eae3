"""Reference PyTorch modules, trainable, one architecture a file; parameter names are the published checkpoints'."""
