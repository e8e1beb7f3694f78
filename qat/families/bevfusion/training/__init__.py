"""Trains the float detector, for users without trained weights."""

from qat.families.bevfusion.training.loop import TrainOptions, train

__all__ = ["TrainOptions", "train"]
