"""observe_r1: a PyTorch-Lightning trainer for multimodal GRPO with the Observe-R1 recipe (arXiv 2505.12432)."""

from observe_r1 import cuda_wheels

__version__ = "0.1.0"

cuda_wheels.install()
