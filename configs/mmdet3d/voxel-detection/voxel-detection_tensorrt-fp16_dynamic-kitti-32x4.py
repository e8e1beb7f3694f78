_base_ = "./voxel-detection_tensorrt_dynamic-kitti-32x4.py"
backend_config = dict(common_config=dict(fp16_mode=True))
