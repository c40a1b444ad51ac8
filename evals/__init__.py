"""Tasks and measurements. Nothing in nanokv or kernels imports this package."""
