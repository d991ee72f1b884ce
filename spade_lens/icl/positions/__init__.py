"""Which positions suffice for the answer, by SPADE."""
