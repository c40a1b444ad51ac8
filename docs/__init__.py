"""The pages for readers, and the scripts that print what stands in them."""
