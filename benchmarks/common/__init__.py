"""Timing, tables, pictures, and a real pretrained model."""
