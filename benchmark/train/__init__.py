"""Models, losses, augmentation, the loop, and what a defense may use."""
