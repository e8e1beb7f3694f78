_base_ = ["./voxel-detection_dynamic.py", "../../_base_/backends/openvino-int8.py"]
backend_config = dict(model_inputs=[dict(opt_shapes=dict(voxels=[20000, 64, 4], num_points=[20000], coors=[20000, 4]))])
