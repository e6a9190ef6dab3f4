"""From noise to a latent: schedules, solvers, guidance and sizes."""
