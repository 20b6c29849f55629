"""The embedder: Qwen2.5-VL with a frozen vision tower and LoRA, its contrastive loss, and the LightningModule."""
