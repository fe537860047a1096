"""How good generated images are: FID, KID, IS, precision and recall, CLIP score, and how well a tokenizer reconstructs.

`evaluate.py --metrics` measures; the functions here know features and images, no models that sample.
"""
