"""mmdet3d's VoteNet: PointNet++, votes, proposals; the host computes every index."""
