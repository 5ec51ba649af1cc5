"""What leaves for production beside a bundle: ONNX, AOTInductor packages, quantised fbgemm modules."""
