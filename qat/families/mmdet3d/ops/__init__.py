"""The operators that mmdet3d's models call: `mmcv._ext` where mmcv was not compiled, and the same as plain numpy functions.

`install()` before mmdet or mmdet3d is imported. Numpy, without torch: `voxels.voxelize`, `points.furthest_point_sample`,
`points.ball_query`, `points.nearest_points`, `points.points_in_boxes`, and `qat.boxes.overlap`'s `nms_rotated` and `box_iou_rotated`.

What mmdet3d 1.4's models call when they predict (counted on one config each, with random weights). E: has a form that torch.export
and `torch.onnx.export(dynamo=True, optimize=False)` take; the others run on the host, before or after what is exported.

    operator                                    E  called by
    hard_voxelize                               -  PointPillars, CenterPoint, SSN, and what needs sparse convolutions
    dynamic_voxelize, dynamic_point_to_voxel    -  PointPillars with dynamic voxels
    nms_rotated                                 -  PointPillars, CenterPoint (not with circle NMS), SSN, PointRCNN, FCOS3D, PGD,
                                                     ImVoxelNet on KITTI
    nms                                         -  3DSSD
    iou3d_nms3d, iou3d_nms3d_normal             -  ImVoxelNet indoors (read in its code, not run)
    furthest_point_sampling, gather_points,     E  VoteNet, H3DNet, GroupFree3D, 3DSSD, PointRCNN, PointNet++, PAConv
      group_points
    ball_query                                  E  the same but PAConv
    three_nn, three_interpolate                 E  the same but 3DSSD
    knn                                         E  PAConv, DGCNN (with group_points)
    furthest_point_sampling_with_dist           E  3DSSD (not on OpenVINO)
    assign_score_withk                          E  PAConv (CUDA's config)
    points_in_boxes_all, …_part, …_cpu          E  VoteNet, H3DNet, GroupFree3D, 3DSSD; PointRCNN; training
    roipoint_pool3d, roiaware_pool3d            -  PointRCNN; Part-A2, should its sparse convolutions be there
    deform_conv, modulated_deform_conv          E  CenterPoint's DCN heads; FCOS3D, PGD, SMOKE
    box_iou_rotated                             -  training: assigners

Sparse convolutions are not replaced: SECOND, CenterPoint with voxels, Part-A2, PV-RCNN, MVX-Net, Cylinder3D are refused by name;
FCAF3D and MinkUNet want other packages (MinkowskiEngine, torchsparse).

Against mmcv 2.1's own kernels, compiled for a CPU: ball_query, three_nn, points_in_boxes and roiaware_pool3d are bit-identical; knn
has another order among equal distances; box_iou_rotated differs by 7e-7 (ours is float64). The CUDA kernel of nms3d counts a corner
as inside up to 1 cm outside a box; ours does not, so overlaps of small boxes differ there. A deformable sample exactly on a pixel may
have the gradient of its other side.
"""

from __future__ import annotations

from qat.families.mmdet3d.ops.stand_in import MissingOperatorError, install, which

__all__ = ["MissingOperatorError", "install", "which"]
