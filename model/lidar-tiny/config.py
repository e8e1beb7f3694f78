# A CenterPoint over pillars sized for a laptop CPU, as an mmdet3d 1.x config: four revolutions in 0.5 s, a 208 x 416 grid of 0.25 m that is
# longer along the street (y is forward), one task of ten classes. Autoware's lidar_centerpoint can load it: 32 points of 11 features a pillar.
point_cloud_range = [-26.0, -52.0, -5.0, 26.0, 52.0, 3.0]
voxel_size = [0.25, 0.25, 8.0]
limits = [-30.0, -56.0, -10.0, 30.0, 56.0, 10.0]
class_names = [
    "car",
    "truck",
    "trailer",
    "bus",
    "construction_vehicle",
    "bicycle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "barrier",
]
metainfo = dict(classes=class_names)
norm = dict(type="BN", eps=1e-3, momentum=0.01)

model = dict(
    type="CenterPoint",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor",
        voxel=True,
        voxel_layer=dict(
            max_num_points=32, point_cloud_range=point_cloud_range, voxel_size=voxel_size, max_voxels=(16000, 20000)
        ),
    ),
    pts_voxel_encoder=dict(
        type="PillarFeatureNet",
        in_channels=5,
        feat_channels=[32],
        with_distance=False,
        voxel_size=voxel_size,
        point_cloud_range=point_cloud_range,
        norm_cfg=dict(type="BN1d", eps=1e-3, momentum=0.01),
        legacy=False,
    ),
    pts_middle_encoder=dict(type="PointPillarsScatter", in_channels=32, output_shape=(416, 208)),
    pts_backbone=dict(
        type="SECOND",
        in_channels=32,
        out_channels=[32, 64, 128],
        layer_nums=[2, 3, 3],
        layer_strides=[2, 2, 2],
        norm_cfg=norm,
    ),
    pts_neck=dict(
        type="SECONDFPN",
        in_channels=[32, 64, 128],
        out_channels=[32, 32, 32],
        upsample_strides=[1, 2, 4],
        norm_cfg=norm,
        upsample_cfg=dict(type="deconv", bias=False),
        use_conv_for_no_stride=True,
    ),
    pts_bbox_head=dict(
        type="CenterHead",
        in_channels=96,
        tasks=[dict(num_class=10, class_names=class_names)],
        common_heads=dict(reg=(2, 2), height=(1, 2), dim=(3, 2), rot=(2, 2), vel=(2, 2)),
        share_conv_channel=32,
        bbox_coder=dict(
            type="CenterPointBBoxCoder",
            post_center_range=limits,
            max_num=300,
            score_threshold=0.05,
            out_size_factor=2,
            voxel_size=voxel_size[:2],
            pc_range=point_cloud_range[:2],
            code_size=9,
        ),
        separate_head=dict(type="SeparateHead", head_conv=32, init_bias=-2.19, final_kernel=3),
        loss_cls=dict(type="mmdet.GaussianFocalLoss", reduction="mean"),
        loss_bbox=dict(type="mmdet.L1Loss", reduction="mean", loss_weight=0.25),
        norm_bbox=True,
    ),
    train_cfg=dict(
        pts=dict(
            grid_size=[208, 416, 1],
            point_cloud_range=point_cloud_range,
            voxel_size=voxel_size,
            out_size_factor=2,
            dense_reg=1,
            gaussian_overlap=0.1,
            max_objs=200,
            min_radius=2,
            code_weights=[1.0] * 6 + [2.0, 2.0] + [0.2, 0.2],
        )
    ),
    test_cfg=dict(
        pts=dict(
            post_center_limit_range=limits,
            max_per_img=300,
            max_pool_nms=False,
            min_radius=[1.0],
            score_threshold=0.05,
            pc_range=point_cloud_range[:2],
            out_size_factor=2,
            voxel_size=voxel_size[:2],
            nms_type="rotate",
            pre_max_size=500,
            post_max_size=150,
            nms_thr=0.2,
        )
    ),
)

test_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=5),
    dict(type="LoadPointsFromMultiSweeps", sweeps_num=3, use_dim=[0, 1, 2, 3, 4], test_mode=True),
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="Pack3DDetInputs", keys=["points"]),
]
test_dataloader = dict(
    dataset=dict(
        type="NuScenesDataset",
        data_root="example-data/",
        ann_file="nuscenes_infos_eval.pkl",
        data_prefix=dict(pts="samples/LIDAR_TOP", sweeps="sweeps/LIDAR_TOP"),
        pipeline=test_pipeline,
        metainfo=metainfo,
        test_mode=True,
        box_type_3d="LiDAR",
    )
)
default_scope = "mmdet3d"
