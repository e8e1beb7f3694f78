"""VoteNet as mmdet3d has it: PointNet++, votes, proposals; every index comes from the host."""
