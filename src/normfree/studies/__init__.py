"""Studies: what the paper claims, measured again; each a function of numbers that ends in a table or a picture."""
