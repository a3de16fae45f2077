"""From two sets of images to figures: sets, features, surveys, metrics."""
