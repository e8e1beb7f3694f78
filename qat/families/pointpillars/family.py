"""PointPillars for the stages that run PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any

from qat.core.errors import UserError
from qat.families.mmdet3d.pillar_family import PillarFamily
from qat.families.pointpillars.flow import BOXES, CLASSES, DIRECTIONS

GENERATORS = {"Anchor3DRangeGenerator": False, "AlignedAnchor3DRangeGenerator": True}


class PointPillarsFamily(PillarFamily):
    """mmdet3d's VoxelNet or MVXFasterRCNN over pillars, with an `Anchor3DHead`."""

    name = "pointpillars"
    head_types = ("Anchor3DHead",)

    def head_settings(self, head: Mapping[str, Any], model: Mapping[str, Any], stride: int) -> dict[str, Any]:
        """As `PillarFamily.head_settings`.

        Raises:
            UserError: anchors or a coder of another kind.
        """
        generator, coder = head.get("anchor_generator", {}), head.get("bbox_coder", {"type": "DeltaXYZWLHRBBoxCoder"})
        if generator.get("type") not in GENERATORS or coder.get("type") != "DeltaXYZWLHRBBoxCoder":
            found = generator.get("type") if generator.get("type") not in GENERATORS else coder.get("type")
            raise UserError(
                f"model: bbox_head: found {found!r}, expected {' or '.join(GENERATORS)} and DeltaXYZWLHRBBoxCoder; export it whole, "
                "with export-mmdet3d"
            )
        scales = list(generator.get("scales", [1]))
        if len(scales) != 1:
            raise UserError(
                f"model: bbox_head: anchor_generator: scales: found {len(scales)}, expected one level of maps"
            )
        test = model.get("test_cfg") or {}
        test = test.get("pts", test)
        sigmoid = bool(head.get("loss_cls", {}).get("use_sigmoid", True))
        classes = int(head["num_classes"])
        return {
            "classes": classes if sigmoid else classes + 1,
            "sigmoid": sigmoid,
            "directions": bool(head.get("use_direction_classifier", True)),
            "rotate": bool(test.get("use_rotate_nms", True)),
            "nms_pre": int(test.get("nms_pre", -1)),
            "nms_thr": float(test.get("nms_thr", 0.5)),
            "score_thr": float(test.get("score_thr", 0)),
            "max_num": int(test.get("max_num", 500)),
            "dir_offset": float(head.get("dir_offset", -pi / 2)),
            "dir_limit_offset": float(head.get("dir_limit_offset", 0)),
            "stride": stride,
            "anchors": {
                "ranges": [[float(v) for v in each] for each in generator["ranges"]],
                "sizes": [[float(v) for v in each] for each in generator["sizes"]],
                "rotations": [float(v) for v in generator.get("rotations", [0, 1.5707963])],
                "scale": float(scales[0]),
                "custom_values": [float(v) for v in generator.get("custom_values", ())],
                "size_per_range": bool(generator.get("size_per_range", True)),
                "aligned": GENERATORS[generator["type"]],
                "align_corner": bool(generator.get("align_corner", False)),
            },
        }

    def output_names(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """As `PillarFamily.output_names`."""
        return (CLASSES, BOXES, *([DIRECTIONS] if settings["head"]["directions"] else []))


FAMILY = PointPillarsFamily()
