"""CUDA graphs of the encoder, the heads and the merging of gradients.

Models and surgery do not import this package: `install.py` and `record_merging` connect them.
"""

from fastmtl.cuda_graphs.merging import record_merging

__all__ = ["record_merging"]
