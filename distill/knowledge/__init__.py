"""What is known: the graph of all triplets, one that grows with every dream, and what they tell of a prompt."""
