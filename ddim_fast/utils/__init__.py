"""Small tools that every room may import, and that import none of them."""
