"""The public Python API: load a model with its tokenizer and VQGAN, and generate images.

from dalle.models import Dalle          # minDALL-E's names: from_pretrained, to, sampling
images = Dalle.from_pretrained("demo").sampling("red apple", num_candidates=8)

from dalle.loading import load          # the parts
loaded = load("demo")
"""
