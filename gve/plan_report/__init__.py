"""`gve plan`: what a run will do and cost, before any GPU is taken; and a logged curriculum under other settings."""
