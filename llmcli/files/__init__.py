"""Files: atomic writes, manifests, checkpoints, tensors. The only layer that writes to a final path."""
