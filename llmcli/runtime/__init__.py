"""Sessions, sampling, decoding; token ids only, no text."""
