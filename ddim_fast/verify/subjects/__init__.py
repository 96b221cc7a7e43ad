"""How the samplers under test are called."""
