"""Find, download and convert models. Each downloaded model has its own directory next to these files."""
