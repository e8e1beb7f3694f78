"""BEV pooling."""
