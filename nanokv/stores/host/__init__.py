"""Stores of which K, V or both lie in the host's memory. Codes and scales may not enter: only exact slots are kept on
the host.
"""
