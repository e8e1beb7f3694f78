# A tiny PointPillars for tests: 88 x 64 cells, longer than wide, KITTI's three classes, the old pillar features.
point_cloud_range = [0, -12.8, -3, 35.2, 12.8, 1]
voxel_size = [0.4, 0.4, 4]
class_names = ["Pedestrian", "Cyclist", "Car"]
metainfo = dict(classes=class_names)

model = dict(
    type="VoxelNet",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor",
        voxel=True,
        voxel_layer=dict(
            max_num_points=8, point_cloud_range=point_cloud_range, voxel_size=voxel_size, max_voxels=(1000, 2000)
        ),
    ),
    voxel_encoder=dict(
        type="PillarFeatureNet",
        in_channels=4,
        feat_channels=[16],
        with_distance=False,
        voxel_size=voxel_size,
        point_cloud_range=point_cloud_range,
    ),
    middle_encoder=dict(type="PointPillarsScatter", in_channels=16, output_shape=[64, 88]),
    backbone=dict(
        type="SECOND", in_channels=16, layer_nums=[1, 1, 1], layer_strides=[2, 2, 2], out_channels=[16, 24, 32]
    ),
    neck=dict(type="SECONDFPN", in_channels=[16, 24, 32], upsample_strides=[1, 2, 4], out_channels=[16, 16, 16]),
    bbox_head=dict(
        type="Anchor3DHead",
        num_classes=3,
        in_channels=48,
        feat_channels=48,
        use_direction_classifier=True,
        anchor_generator=dict(
            type="AlignedAnchor3DRangeGenerator",
            ranges=[
                [0, -12.8, -0.6, 35.2, 12.8, -0.6],
                [0, -12.8, -0.6, 35.2, 12.8, -0.6],
                [0, -12.8, -1.78, 35.2, 12.8, -1.78],
            ],
            sizes=[[0.8, 0.6, 1.73], [1.76, 0.6, 1.73], [3.9, 1.6, 1.56]],
            rotations=[0, 1.57],
            reshape_out=False,
        ),
        diff_rad_by_sin=True,
        bbox_coder=dict(type="DeltaXYZWLHRBBoxCoder"),
        loss_cls=dict(type="mmdet.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="mmdet.SmoothL1Loss", beta=1.0 / 9.0, loss_weight=2.0),
        loss_dir=dict(type="mmdet.CrossEntropyLoss", use_sigmoid=False, loss_weight=0.2),
    ),
    train_cfg=None,
    test_cfg=dict(
        use_rotate_nms=True,
        nms_across_levels=False,
        nms_thr=0.01,
        score_thr=0.1,
        min_bbox_size=0,
        nms_pre=100,
        max_num=50,
    ),
)
test_dataloader = dict(
    dataset=dict(
        type="KittiDataset",
        data_root="data/kitti/",
        ann_file="kitti_infos_val.pkl",
        data_prefix=dict(pts="training/velodyne_reduced"),
        pipeline=[
            dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4),
            dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
            dict(type="Pack3DDetInputs", keys=["points"]),
        ],
        metainfo=metainfo,
        test_mode=True,
        box_type_3d="LiDAR",
    )
)
default_scope = "mmdet3d"
