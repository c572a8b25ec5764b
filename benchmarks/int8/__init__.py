"""INT8 side by side: admth, ONNX Runtime and NNCF, on two data sets and two backbones: ``make bench-int8``."""
