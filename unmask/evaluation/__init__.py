"""What a model can do: measured on held-out data."""
