# As AWML's deploy configs, for tests/mmdet3d/configs/awml_small.py.
checkpoint_path = "work_dirs/centerpoint/best_checkpoint.pth"
devices = dict(cpu="cpu", cuda="cuda:0")
export = dict(mode="both", work_dir="work_dirs/centerpoint_deployment", onnx_path=None)
components = dict(
    pts_voxel_encoder=dict(
        onnx_file="pts_voxel_encoder.onnx",
        engine_file="pts_voxel_encoder.engine",
        io=dict(
            inputs=[dict(name="input_features", dtype="float32")],
            outputs=[dict(name="pillar_features", dtype="float32")],
            dynamic_axes={"input_features": {0: "num_voxels"}, "pillar_features": {0: "num_voxels"}},
        ),
        tensorrt_profile=dict(
            input_features=dict(min_shape=[10, 32, 10], opt_shape=[1000, 32, 10], max_shape=[2000, 32, 10])
        ),
    ),
    pts_backbone_neck_head=dict(
        onnx_file="pts_backbone_neck_head.onnx",
        engine_file="pts_backbone_neck_head.engine",
        io=dict(
            inputs=[dict(name="spatial_features", dtype="float32")],
            outputs=[dict(name=n, dtype="float32") for n in ("heatmap", "reg", "height", "dim", "rot", "vel")],
        ),
        tensorrt_profile=dict(
            spatial_features=dict(min_shape=[1, 32, 64, 96], opt_shape=[1, 32, 64, 96], max_shape=[1, 32, 64, 96])
        ),
    ),
)
runtime_io = dict(info_file="data/t4dataset/info/infos_val.pkl", sample_idx=1)
onnx_config = dict(opset_version=16, do_constant_folding=True, export_params=True, simplify=True)
tensorrt_config = dict(precision_policy="auto", max_workspace_size=2 << 30)
evaluation = dict(
    enabled=False,
    num_samples=2,
    backends=dict(
        pytorch=dict(enabled=True, device=devices["cpu"]),
        onnx=dict(enabled=True, device=devices["cpu"]),
        tensorrt=dict(enabled=True, device=devices["cuda"]),
    ),
)
verification = dict(enabled=False, tolerance=1e-1, num_verify_samples=1)
