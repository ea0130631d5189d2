"""What comes before an answer: who dreams, who judges it, what is kept of it, and the model that does it all."""
