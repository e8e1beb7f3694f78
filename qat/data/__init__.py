"""nuScenes-format data: reading it, drawing it, generating it."""

from qat.data.dataset import CAMERAS, NuScenesDataset, check_annotated, images_digest, version_in
from qat.data.sample import Keyframe, Sample

__all__ = ["CAMERAS", "Keyframe", "NuScenesDataset", "Sample", "check_annotated", "images_digest", "version_in"]
