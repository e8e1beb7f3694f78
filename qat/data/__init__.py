"""nuScenes-format data: reading it, drawing it, generating it."""

from qat.data.dataset import CAMERAS, NuScenesDataset
from qat.data.sample import Keyframe, Sample

__all__ = ["CAMERAS", "Keyframe", "NuScenesDataset", "Sample"]
