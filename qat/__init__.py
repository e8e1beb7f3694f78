"""bevqat: a quantization-aware export workbench for camera BEV models."""

__version__ = "0.1.0"
