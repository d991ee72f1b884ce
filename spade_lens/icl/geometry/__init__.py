"""Geometry of rule vectors: similarity, probes, demixed PCA. Knows tensors, nothing of models."""
