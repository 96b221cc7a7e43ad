"""PTX executed on the CPU: a program is parsed, decoded and run in lock step, with every access checked."""
