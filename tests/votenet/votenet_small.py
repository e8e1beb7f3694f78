# A tiny VoteNet for tests: 1024 points, SUN RGB-D's pipeline, three classes.
class_names = ("bed", "table", "chair")
metainfo = dict(classes=class_names)
sums = dict(type="mmdet.CrossEntropyLoss", reduction="sum")

model = dict(
    type="VoteNet",
    data_preprocessor=dict(type="Det3DDataPreprocessor"),
    backbone=dict(
        type="PointNet2SASSG",
        in_channels=4,
        num_points=(128, 64, 32, 16),
        radius=(0.4, 0.8, 1.2, 1.6),
        num_samples=(16, 8, 8, 8),
        sa_channels=((16, 16, 32), (32, 32, 48), (32, 32, 48), (32, 32, 48)),
        fp_channels=((48, 48), (48, 40)),
        norm_cfg=dict(type="BN2d"),
        sa_cfg=dict(type="PointSAModule", pool_mod="max", use_xyz=True, normalize_xyz=True),
    ),
    bbox_head=dict(
        type="VoteHead",
        num_classes=3,
        vote_module_cfg=dict(
            in_channels=40,
            vote_per_seed=1,
            gt_per_seed=3,
            conv_channels=(40, 40),
            conv_cfg=dict(type="Conv1d"),
            norm_cfg=dict(type="BN1d"),
            norm_feats=True,
            vote_loss=dict(type="ChamferDistance", mode="l1", reduction="none", loss_dst_weight=10.0),
        ),
        vote_aggregation_cfg=dict(
            type="PointSAModule",
            num_point=32,
            radius=0.6,
            num_sample=8,
            mlp_channels=[40, 32, 32, 32],
            use_xyz=True,
            normalize_xyz=True,
        ),
        pred_layer_cfg=dict(in_channels=32, shared_conv_channels=(32, 32), bias=True),
        bbox_coder=dict(
            type="PartialBinBasedBBoxCoder",
            num_sizes=3,
            num_dir_bins=12,
            with_rot=True,
            mean_sizes=[[2.1, 1.6, 0.9], [0.8, 1.3, 0.7], [0.6, 0.55, 0.8]],
        ),
        objectness_loss=sums,
        center_loss=dict(type="ChamferDistance", mode="l2", reduction="sum"),
        dir_class_loss=sums,
        dir_res_loss=dict(type="mmdet.SmoothL1Loss", reduction="sum"),
        size_class_loss=sums,
        size_res_loss=dict(type="mmdet.SmoothL1Loss", reduction="sum"),
        semantic_loss=sums,
    ),
    train_cfg=None,
    test_cfg=dict(sample_mode="seed", nms_thr=0.25, score_thr=0.05, per_class_proposal=True),
)
test_dataloader = dict(
    dataset=dict(
        type="SUNRGBDDataset",
        data_root="data/sunrgbd/",
        ann_file="sunrgbd_infos_val.pkl",
        pipeline=[
            dict(type="LoadPointsFromFile", coord_type="DEPTH", shift_height=True, load_dim=6, use_dim=[0, 1, 2]),
            dict(
                type="MultiScaleFlipAug3D",
                img_scale=(1333, 800),
                pts_scale_ratio=1,
                flip=False,
                transforms=[dict(type="PointSample", num_points=1024)],
            ),
            dict(type="Pack3DDetInputs", keys=["points"]),
        ],
        metainfo=metainfo,
        test_mode=True,
        box_type_3d="Depth",
    )
)
default_scope = "mmdet3d"
