"""What proves things about GPU code on machines without a GPU. Used by the tests; sampling needs nothing of it."""
