"""A model in PyTorch: opening checkpoints, float or quantized networks, and runners of the plan.

opening     a checkpoint file → `Model`, once
quantized   the float network's parts as graphs with quantizers
runners     a plan's runners on torch tensors and on numpy arrays
units       the units that can be INT8 or float independently
"""
