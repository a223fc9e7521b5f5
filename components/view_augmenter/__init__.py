"""ViewAugmenter: a TFX component that makes seeded pairs of MoCo views ahead of training."""
