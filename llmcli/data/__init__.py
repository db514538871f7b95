"""Tokenizers, reading text, packing, corpora."""
