"""Whole models for other runtimes: ONNX graphs and programs of torch.export.

fastmtl/inference/export.py writes the encoder alone, for other libraries.
"""
