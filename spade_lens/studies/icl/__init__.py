"""The study of in-context learning: experiments by name, on one task."""
