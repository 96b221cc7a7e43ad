"""Drop-ins for the samplers of other libraries: each translates that library's names, looks up noise levels, and calls the step.

None of them is imported with ``ddim_fast``, nor imports the library it stands in for, but ``diffusers``, whose classes it extends.
"""
