"""mmdet3d's PointPillars: pillars, a 2D backbone, anchors."""
