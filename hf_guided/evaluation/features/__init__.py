"""What metrics compare: sets of images, models that give their features, and the features themselves, kept on disk."""
