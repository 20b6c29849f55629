"""What works on this machine, tried and not guessed: packages, torch, decoders, disk, hub, and a model end to end."""
