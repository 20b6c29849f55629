"""`gve embed`, `gve index` and `gve search`."""
