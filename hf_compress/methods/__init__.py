"""How training prepares the weights for patterns: one room for each method."""
