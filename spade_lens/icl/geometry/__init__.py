"""Geometry of rule vectors: likeness, probes, demixed PCA. Knows tensors, nothing of models."""
