"""Stock transformers models with the masked-diffusion contract on top."""
