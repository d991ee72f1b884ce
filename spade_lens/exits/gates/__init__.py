"""Learned gates: policies that are fitted on exit tables, and calibrated on others."""
