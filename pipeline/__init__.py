"""From a checkpoint's name to pictures: the spec, the file, the autoencoder, generation."""
