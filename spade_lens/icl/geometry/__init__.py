"""icl/geometry."""
