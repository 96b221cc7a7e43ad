"""What is true, and how far from it a result may be. This room knows no sampler.

``oracle`` is the DDIM step in float64, ``density`` the Gaussian that a stochastic one draws from,
``cases`` the data that describe a step or a run, ``tolerances`` the bounds on rounding errors,
``statistics`` the tests of random numbers, ``golden`` the recorded runs.
"""
