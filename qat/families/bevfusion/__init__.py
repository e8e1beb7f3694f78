"""BEVFusion."""
