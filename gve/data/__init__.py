"""Training data: shards (written, indexed, read), the curriculum, the plan of every step, and the LightningDataModule."""
