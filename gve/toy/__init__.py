"""The toy world: rendered clips with true captions, a mini UVRB, training shards and a tiny base (gve.toy.world)."""
