"""Where checkpoints are, and saving whole or not at all."""
