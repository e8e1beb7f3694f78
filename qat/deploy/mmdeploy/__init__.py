"""MMDeploy's flows for mmdet3d's lidar detectors, without MMDeploy: its deploy configs, its files and their names."""
