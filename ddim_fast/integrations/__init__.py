"""Drop-ins for the samplers of other libraries.

Each one translates its library's names, looks up noise levels, and calls the step. ``import
ddim_fast`` imports none of them, and only ``diffusers``, whose classes it extends, imports the
library that it replaces.
"""
