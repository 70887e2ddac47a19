"""Export of a trained model to ONNX, torch.export and safetensors. Read export, then formats and module."""
