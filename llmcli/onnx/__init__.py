"""ONNX graphs of decoders, built weight by weight, and the quantization of their weights."""
