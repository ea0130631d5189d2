"""Many trainings on the same data, compared."""
