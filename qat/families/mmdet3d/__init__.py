"""What every mmdet3d model shares."""
