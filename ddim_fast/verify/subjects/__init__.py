"""The samplers under test, each behind one interface. This room knows nothing of what is right.

``subject`` is the interface. ``adapters`` gives it to schedulers, steps and samplers of any origin,
``backends`` to the backends of this package, ``in_the_wild`` to the samplers of other libraries.
"""
