"""The ops on torch tensors, one a file; importing one imports torch."""
