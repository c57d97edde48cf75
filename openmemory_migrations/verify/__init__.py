"""Vectors compared to the bit, exact neighbours, recall, tuning."""
