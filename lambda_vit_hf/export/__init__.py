"""Out of PyTorch: ONNX, int8, torch.export, and the engines compared."""
