"""What a request costs and could cost: measured here, and modelled for cards."""
