"""Stock transformers models with the masked-diffusion contract; importing it registers the Auto classes."""

from unmask.model import denoiser as denoiser
