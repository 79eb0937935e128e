"""Text generation from checkpoints and local Hugging Face models, inside the generation worker."""
