"""prift: token weights from the pretrained model, computed once, stored, and trained with.

Two stages share nothing but a folder of Parquet: `prift precompute` writes what the pretrained
model thought of every token, `prift train` turns that into weights (arXiv 2606.09396).
"""

__version__ = "0.1.0"
