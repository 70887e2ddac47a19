"""Export of a trained model to ONNX, torch.export and safetensors."""
