"""The example of docs/runtime.md runs as it stands there."""

import re
from pathlib import Path

from qat.engine import Options
from qat.runtime import build_engines

PAGE = Path(__file__).parents[2] / "docs" / "runtime.md"


def test_the_robots_node_of_the_docs_gives_named_boxes(tmp_path, exported_fp32, small_scene):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    folder, manifest = build_engines(
        exported_fp32, "openvino", out=tmp_path / "engines", options=Options(1, tmp_path / "cache")
    )
    detector = names["Detector"](folder, small_scene["camera_intrinsics"], small_scene["camera2lidar"])
    boxes = detector(small_scene["images"], small_scene["points"])
    assert len(boxes) > 5
    for box in boxes:
        assert box["name"] in manifest["pipeline"]["classes"] and 0 < box["score"] < 1 and len(box["box"]) == 9
    stages = re.search(r"milliseconds of every stage: (.*?)\. `pattern`", PAGE.read_text(), re.DOTALL)[1]
    assert set(detector.pipeline.timing_ms) == set(re.split(r",\s+", stages))
