"""The cache: values, protocols, prefill and decode. Only `plan.py` knows the methods by name."""
