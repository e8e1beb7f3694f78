"""nuScenes-format data: reads, draws and generates it; `qat.data.writer` writes your recordings."""

from qat.core.frame import CAMERAS
from qat.data.dataset import NuScenesDataset, check_annotated, images_digest, version_in
from qat.data.sample import Keyframe, Sample

__all__ = ["CAMERAS", "Keyframe", "NuScenesDataset", "Sample", "check_annotated", "images_digest", "version_in"]
