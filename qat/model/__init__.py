"""A model in PyTorch: opened from a checkpoint, float or quantized, and what runs its plan.

opening     a checkpoint file → `Model`, once
quantized   the float network's parts as graphs with quantizers
runners     a plan's runners on torch tensors and on numpy arrays
units       the pieces that can be INT8 or float by themselves
"""
