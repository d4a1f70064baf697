"""The experts of a mixture: adapters of 3-D parameters, and where files store them."""
