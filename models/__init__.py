"""Pure PyTorch models, written for one device and one micro-batch: DALL-E, its transformer, and the VQGAN."""
