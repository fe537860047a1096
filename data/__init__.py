"""Pairs of text and image: the built-in demo set, COCO-style folders, and what turns them into tensors."""
