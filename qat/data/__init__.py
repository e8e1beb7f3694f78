"""nuScenes-format data: reading it, drawing it, generating it, writing your own (`qat.data.writer`)."""

from qat.core.frame import CAMERAS
from qat.data.dataset import NuScenesDataset, check_annotated, images_digest, version_in
from qat.data.sample import Keyframe, Sample

__all__ = ["CAMERAS", "Keyframe", "NuScenesDataset", "Sample", "check_annotated", "images_digest", "version_in"]
