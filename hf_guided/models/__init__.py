"""What predicts: the UNet, the classifier of noisy images, and their layers. No sampling, no training."""
