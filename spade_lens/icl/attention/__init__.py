"""icl/attention."""
