# As AWML's CenterPoint configs: their imports and types, one task, two encoder layers; x, y, z and time of two merged revolutions.
_base_ = "./centerpoint_small.py"
custom_imports = dict(
    imports=["projects.CenterPoint.models", "autoware_ml.detection3d.datasets.t4dataset"], allow_failed_imports=False
)
point_cloud_range = [-38.4, -25.6, -3.0, 38.4, 25.6, 5.0]
voxel_size = [0.8, 0.8, 8.0]
class_names = ["car", "truck", "bus", "bicycle", "pedestrian"]
metainfo = dict(classes=class_names)

model = dict(
    data_preprocessor=dict(
        voxel_layer=dict(
            max_num_points=32, point_cloud_range=point_cloud_range, max_voxels=(2000, 2000), deterministic=True
        )
    ),
    pts_voxel_encoder=dict(
        type="PillarFeatureNet",
        in_channels=4,
        feat_channels=[32, 32],
        point_cloud_range=point_cloud_range,
        voxel_size=voxel_size,
    ),
    pts_middle_encoder=dict(in_channels=32),
    pts_backbone=dict(in_channels=32, frozen_stages=None),
    pts_bbox_head=dict(
        type="CenterHead",
        freeze_shared_conv=False,
        tasks=[dict(num_class=5, class_names=class_names)],
        bbox_coder=dict(
            voxel_size=voxel_size,
            pc_range=point_cloud_range,
            post_center_range=[-200.0, -200.0, -10.0, 200.0, 200.0, 10.0],
        ),
        separate_head=dict(type="CustomSeparateHead", init_bias=-4.595, final_kernel=1),
        loss_cls=dict(type="mmdet.AmpGaussianFocalLoss", reduction="none", loss_weight=1.0),
    ),
    test_cfg=dict(pts=dict(nms_type="circle", min_radius=[1.0], post_max_size=100)),
)

test_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=5),
    dict(
        type="LoadPointsFromMultiSweeps",
        sweeps_num=1,
        load_dim=5,
        use_dim=[0, 1, 2, 4],
        pad_empty_sweeps=True,
        remove_close=True,
        test_mode=True,
    ),
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="Pack3DDetInputs", keys=["points"]),
]
test_dataloader = dict(
    dataset=dict(type="T4Dataset", pipeline=test_pipeline, metainfo=metainfo, class_names=class_names)
)
