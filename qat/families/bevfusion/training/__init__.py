"""Training of the float detector, for use where no trained weights are available."""

from qat.families.bevfusion.training.loop import TrainOptions, train

__all__ = ["TrainOptions", "train"]
