"""lenses/fitting."""
