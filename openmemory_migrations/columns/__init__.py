"""Marks and attributes of columns, and what guards a change of them."""
