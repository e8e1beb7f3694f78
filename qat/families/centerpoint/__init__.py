"""CenterPoint over pillars as mmdet3d has it: pillars, a 2D backbone, heat maps of centres."""
