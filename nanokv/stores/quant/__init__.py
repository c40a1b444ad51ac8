"""Stores that round: one file per format."""
