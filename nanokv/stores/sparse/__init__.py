"""Stores of which a step reads only a part."""
