"""The commands of ``ddim-fast``, a file for each group of them; ``cli`` puts them together."""
