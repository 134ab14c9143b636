"""Scripts for `accelerate launch`, their recipes, and the loop that they share."""
