"""The study of early exit on one task, from the choice on calibration prompts to the stopwatch."""
