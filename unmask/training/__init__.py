"""From a recipe to a trained checkpoint, on transformers.Trainer."""
