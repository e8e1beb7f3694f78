"""MMDeploy's flows for mmdet3d models: deploy configs read as they are, without mmdeploy and without its compiled operators."""
