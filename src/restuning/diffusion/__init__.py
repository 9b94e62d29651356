"""Text-to-image on diffusers: tuning, generation, and how good the pictures are."""
