"""icl/positions."""
