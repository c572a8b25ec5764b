"""Export of trained networks to ONNX, with the sign-parity gate."""
