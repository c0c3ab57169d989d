"""Plain-torch models on padded texts `[B, L]` with a mask, for torch.export and ONNX.

A PaddedModel has the weights and the results of a MultiTaskModel, without packed batches, without
kernels of fastmtl and without gradients per task.
"""

from fastmtl.model.padded.model import PaddedModel

__all__ = ["PaddedModel"]
