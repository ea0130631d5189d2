"""What an answer holds: triplets, from its clauses, from the teacher or from a dataset."""
