"""mmdet3d's metrics on the CPU, with its keys and values: KITTI AP and indoor mAP. (nuScenes' are the devkit's: `qat.evaluate`.)"""
