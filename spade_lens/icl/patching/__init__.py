"""icl/patching."""
