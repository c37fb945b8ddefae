"""Export to ONNX, int8 and `torch.export`, and the inference engines compared."""
