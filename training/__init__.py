"""From images to a checkpoint: data, order, objective, state, the folder of a run, previews."""
