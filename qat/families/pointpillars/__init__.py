"""PointPillars as mmdet3d has it: pillars, a 2D backbone, anchors."""
