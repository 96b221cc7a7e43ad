"""What is true: the float64 oracle, tolerances, statistics, recorded runs and the cases put to a subject."""
