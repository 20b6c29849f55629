"""Training data: shards written, indexed and read; the curriculum; the plan of every step; the LightningDataModule."""
