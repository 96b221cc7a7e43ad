"""What to compute: noise levels, timesteps, coefficients, and the plan of a run."""
