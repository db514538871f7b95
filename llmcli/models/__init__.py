"""Torch modules of the model families, and their folders."""
