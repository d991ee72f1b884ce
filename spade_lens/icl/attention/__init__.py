"""Attention heads: what they write, cutting what they read, and the saliency of weights."""
