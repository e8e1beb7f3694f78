"""nuScenes-format data: reading it, drawing it, generating it."""

from qat.data.dataset import CAMERAS, NuScenesDataset, Sample

__all__ = ["CAMERAS", "NuScenesDataset", "Sample"]
