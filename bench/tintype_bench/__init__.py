"""Measurements: cases, conditions, and the tables that the documentation quotes."""
