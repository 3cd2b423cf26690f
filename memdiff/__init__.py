"""memdiff: long-tailed recognition with memory-conditioned diffusion."""

__version__ = "0.1.0"
