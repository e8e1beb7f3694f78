"""Training of the float detector, so that there is something to quantize where no trained weights can be fetched."""

from qat.families.bevfusion.training.loop import TrainOptions, train

__all__ = ["TrainOptions", "train"]
