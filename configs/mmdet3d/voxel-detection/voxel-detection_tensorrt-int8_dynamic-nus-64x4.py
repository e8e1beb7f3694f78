_base_ = "./voxel-detection_tensorrt_dynamic-nus-64x4.py"
backend_config = dict(common_config=dict(fp16_mode=True, int8_mode=True, strongly_typed=True))
