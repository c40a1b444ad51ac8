"""Tasks and measurements. Neither nanokv nor kernels imports this package."""
