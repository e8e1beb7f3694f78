# A PointPillars for KITTI's three classes, sized for a laptop CPU, as an mmdet3d 1.x config: a 272 x 288 grid of 0.2 m in camera 2's field
# of view, in which nearly all moderate cars are. Anchors stand on the ground, 1.73 m below the lidar, and have the mean sizes of generated objects, which are nuScenes', not KITTI's.
point_cloud_range = [0, -27.2, -3, 57.6, 27.2, 1]
voxel_size = [0.2, 0.2, 4]
class_names = ["Pedestrian", "Cyclist", "Car"]
metainfo = dict(classes=class_names)
norm = dict(type="BN", eps=1e-3, momentum=0.01)
ground = [0, -27.2, -1.73, 57.6, 27.2, -1.73]

model = dict(
    type="VoxelNet",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor",
        voxel=True,
        voxel_layer=dict(
            max_num_points=32, point_cloud_range=point_cloud_range, voxel_size=voxel_size, max_voxels=(16000, 20000)
        ),
    ),
    voxel_encoder=dict(
        type="PillarFeatureNet",
        in_channels=4,
        feat_channels=[32],
        with_distance=False,
        voxel_size=voxel_size,
        point_cloud_range=point_cloud_range,
        norm_cfg=dict(type="BN1d", eps=1e-3, momentum=0.01),
    ),
    middle_encoder=dict(type="PointPillarsScatter", in_channels=32, output_shape=[272, 288]),
    backbone=dict(
        type="SECOND",
        in_channels=32,
        layer_nums=[2, 3, 3],
        layer_strides=[2, 2, 2],
        out_channels=[32, 64, 96],
        norm_cfg=norm,
    ),
    neck=dict(
        type="SECONDFPN",
        in_channels=[32, 64, 96],
        out_channels=[32, 32, 32],
        upsample_strides=[1, 2, 4],
        norm_cfg=norm,
        upsample_cfg=dict(type="deconv", bias=False),
        use_conv_for_no_stride=True,
    ),
    bbox_head=dict(
        type="Anchor3DHead",
        num_classes=3,
        in_channels=96,
        feat_channels=96,
        use_direction_classifier=True,
        assign_per_class=True,
        anchor_generator=dict(
            type="AlignedAnchor3DRangeGenerator",
            ranges=[ground, ground, ground],
            sizes=[[0.73, 0.67, 1.77], [1.85, 0.67, 1.38], [4.6, 1.95, 1.73]],
            rotations=[0, 1.57],
            reshape_out=False,
        ),
        diff_rad_by_sin=True,
        bbox_coder=dict(type="DeltaXYZWLHRBBoxCoder"),
        loss_cls=dict(type="mmdet.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="mmdet.SmoothL1Loss", beta=1.0 / 9.0, loss_weight=2.0),
        loss_dir=dict(type="mmdet.CrossEntropyLoss", use_sigmoid=False, loss_weight=0.2),
    ),
    train_cfg=dict(
        assigner=[
            dict(
                type="Max3DIoUAssigner",
                iou_calculator=dict(type="BboxOverlapsNearest3D"),
                pos_iou_thr=pos,
                neg_iou_thr=neg,
                min_pos_iou=neg,
                ignore_iof_thr=-1,
            )
            for pos, neg in ((0.35, 0.2), (0.4, 0.25), (0.6, 0.45))
        ],
        allowed_border=0,
        pos_weight=-1,
        debug=False,
    ),
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
