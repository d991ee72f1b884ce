"""The study of a small transformer that learns in context, held against what is known exactly."""
