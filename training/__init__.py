"""Training: set-up, loop, schedule, checkpoints and resume of a DALL-E (`run.train`) and of a VQGAN (`vqgan.train`)."""
