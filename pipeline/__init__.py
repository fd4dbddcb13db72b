"""Low-resolution faces in, samples out: what infer.py, the evaluation and other projects call."""

from pipeline.samples import Samples
from pipeline.upsampler import Upsampler

__all__ = ["Samples", "Upsampler"]
