"""The commands of ``ddim-fast``, one file per group; ``cli`` puts them together."""
