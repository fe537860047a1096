"""The public Python API: load a model with its tokenizer and its VQGAN, and draw with it.

from dalle.loading import load
loaded = load("demo")
"""
